"""The student: loading it, giving it an adapter, and making sure that its output head is read rightly.

Nothing here trains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hfkd.batch import Batch
from hfkd.config import DistillationConfig
from hfkd.loading import load_causal_lm
from hfkd.rows import Head, decode


def make_student(model: Any, peft_config: Any, args: DistillationConfig) -> nn.Module:
    """Load the student if it was given by name, and put an adapter on it if one was asked for.

    Args:
        model: A causal LM, a PEFT model, or a hub id or folder.
        peft_config: The adapter, or None.
        args: Its `model_init_kwargs` go to `from_pretrained`; weights are float32 unless they say otherwise.

    Raises:
        ValueError: The model has an adapter already.
    """
    if isinstance(model, str):
        model = load_causal_lm(model, "the student", **{"dtype": torch.float32, **(args.model_init_kwargs or {})})
    if peft_config is None:
        return model
    if hasattr(model, "peft_config"):
        raise ValueError("The model has an adapter already, and a `peft_config` was passed too. Pass one of the two.")
    from peft import get_peft_model

    return get_peft_model(model, peft_config)


def pad_token(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The id to pad with. Padding is masked and never learned, so any id will do; EOS where there is none."""
    if tokenizer is None:
        return 0
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token is not None), 0)


def check_head(model: nn.Module, batch: Batch, tokens: int = 16) -> None:
    """Hold the logits rebuilt from the head against the model's own, on the first tokens of the first row.

    Args:
        model: In eval mode.
        batch: Any batch.
        tokens: How many tokens to run.

    Raises:
        HeadError: They differ.
    """
    view = batch.student
    length = int(view.attention_mask[0].sum())
    first = int(view.attention_mask[0].long().argmax())
    ids = view.input_ids[:1, first : first + min(tokens, length)]
    mask = torch.ones_like(ids)
    hidden = decode(model, ids, mask).last_hidden_state[0]
    logits = model(input_ids=ids, attention_mask=mask).logits[0]
    if bool(torch.isfinite(logits).all()):  # if not, the loss will be no number, and its error says more
        Head.of(model).check(hidden, logits)
