"""Loading a causal LM so that it is whole: safetensors, every weight there, and one sentence where a file is damaged.

It doesn't know whether the model is to learn or to teach.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_causal_lm(name: str, what: str = "the model", **options: Any) -> PreTrainedModel:
    """Load a model by its hub id or folder.

    Args:
        name: Hub id or folder.
        what: Begins the message of an error: "the teacher", say.
        options: Of `from_pretrained`. Weights are read from safetensors only, unless `gguf_file` or `use_safetensors`
            is among them.

    Raises:
        OSError: It can't be found, a file is truncated or damaged, or weights are missing.
    """
    if "gguf_file" not in options:
        options.setdefault("use_safetensors", True)  # pickled weights can run code when they are read
    what = f"{what} {name}"
    model, info = readable(
        lambda: AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options), what
    )
    wrong = sorted(map(str, [*(info.get("missing_keys") or []), *(info.get("mismatched_keys") or [])]))
    if wrong:
        raise OSError(
            f"{what} lacks {len(wrong)} of its weights, {wrong[0]} among them, which would be random numbers; its "
            f"files "
            "are incomplete, or they are of another architecture"
        )
    return model


def readable(load: Callable[[], Any], what: str) -> Any:
    """What `load` gives; its many ways to fail on a damaged file become one sentence with the remedy.

    Raises:
        OSError: A file is missing, truncated or damaged; `what` names it.
    """
    try:
        return load()
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise OSError(
            f"{what} can't be read: {error}. A file is probably truncated or damaged; delete it and fetch it anew"
        ) from error
    except (OSError, ValueError) as error:
        raise OSError(f"{what} can't be loaded: {error}") from error
