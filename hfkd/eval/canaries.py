"""Does a model remember a secret? Scores a canary among the texts that could have been inserted in its place.

How the rank becomes an exposure is `hfkd.measures.exposure`; who inserted the canary, and how often, isn't known
here. An exposure proves that something leaked; a small one proves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hfkd.batch import IGNORE, View
from hfkd.data.collate import DistillationCollator
from hfkd.measures import exposure
from hfkd.packing import run_view
from hfkd.plan import rows_that_fit
from hfkd.rows import DenseRows, Head, RowLayout, input_device, supervised
from hfkd.student import pad_token
from hfkd.teachers import evaluating


def canary_exposure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    canary: str,
    candidates: Sequence[str],
    *,
    prompt: str = "",
    batch_size: int = 64,
) -> dict[str, Any]:
    """Rank a canary among candidates by how surprising each is to a model.

    Args:
        model: A causal LM in this process.
        tokenizer: Of the model.
        canary: The text that was inserted into the training set of the model, or of its teacher.
        candidates: All texts that could have been inserted, or a sample of them; the canary may be one of them.
        prompt: What stands before each of them and isn't scored.
        batch_size: Texts that are read together.

    Returns:
        What `hfkd.measures.exposure` returns, and `log_perplexity`, that of the canary (nats).

    Raises:
        ValueError: There are no other candidates, a text has no token, or the model's outputs aren't numbers.
    """
    texts = list(dict.fromkeys([canary, *candidates]))
    if len(texts) < 2:
        raise ValueError(
            "There is no candidate besides the canary, so nothing to rank it among. Pass the texts that could have "
            "been inserted in its place: the same sentence with other digits, say."
        )
    scores = log_perplexities(model, tokenizer, texts, prompt=prompt, batch_size=batch_size)
    return exposure(scores, [text == canary for text in texts]) | {"log_perplexity": scores[0]}


def log_perplexities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    prompt: str = "",
    batch_size: int = 64,
) -> list[float]:
    """How surprising each text is: minus the sum of its tokens' log-probabilities (nats), in the order of the texts.

    Args:
        model: A causal LM in this process.
        tokenizer: Of the model.
        texts: The texts, at least a token each.
        prompt: What stands before each and isn't scored; without one they begin with the tokenizer's first or last
            token.
        batch_size: Texts that are read together.

    Raises:
        ValueError: A text has no token, or there is nothing that the first one could be predicted from.
    """
    before = _before(tokenizer, prompt)
    examples = [_example(tokenizer, text, before) for text in texts]
    collate, scores = DistillationCollator(pad_token(tokenizer)), []
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(examples), batch_size):
            inputs = collate(examples[start : start + batch_size])
            names = ("input_ids", "attention_mask", "labels")
            view = View(*(inputs[name].to(input_device(model)) for name in names))
            scores += _scores(model, view).tolist()
    return scores


def _before(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids = tokenizer(prompt, add_special_tokens=bool(prompt))["input_ids"]
    if not ids:
        ids = [number for number in (tokenizer.bos_token_id, tokenizer.eos_token_id) if number is not None][:1]
    if not ids:
        raise ValueError("The tokenizer has neither a first nor a last token; pass a prompt for the texts to follow.")
    return ids


def _example(tokenizer: PreTrainedTokenizerBase, text: str, before: list[int]) -> dict[str, Any]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"The text {text!r} has no token; expected at least one.")
    return {"student": {"input_ids": [*before, *ids], "labels": [IGNORE] * len(before) + ids}}


def _scores(model: nn.Module, view: View) -> Tensor:
    """[B] minus the sum of the log-probabilities of each row's supervised tokens, a chunk of rows at a time."""
    hidden, labels = run_view(model, view)
    rows = DenseRows(supervised(hidden, labels), Head.of(model)).detached()
    targets, sequence = view.targets, RowLayout.of(view.labels).sequence
    size = rows_that_fit(rows.vocab_size, targets.device)
    buffer = rows.hidden.new_empty(min(size, len(rows)), rows.vocab_size, dtype=torch.float32)
    total = torch.zeros(len(view.labels), dtype=torch.float64)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        log_probs = torch.log_softmax(rows.logits(part, buffer), dim=-1)
        found = log_probs.gather(-1, targets[part, None])[:, 0]
        total.index_add_(0, sequence[part].cpu(), found.double().cpu())
    return -total
