"""One whole model out of an adapter and its base, for those who shall need nothing but transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfkd.uploads import BASE, read_adapter_config


def write_merged(folder: Path, out: Path, run: Mapping[str, Any]) -> None:
    """Merge the adapter in a folder into its base and write the model.

    The base is loaded in the type that the run trained it in, so that the result is the model that was evaluated.

    Args:
        folder: Of the run.
        out: Where the weights and the configuration are written.
        run: What `run.json` says; empty where there is none.

    Raises:
        ValueError: There is no adapter, or its base is quantised.
        OSError: The base can't be found or read.
    """
    student = (run.get("recipe") or {}).get("student") or {}
    if (student.get("load_kwargs") or {}).get("quantization_config"):
        raise ValueError(
            f"The adapter in {folder} was trained on a quantised base, and merging would round it away. Push the "
            "adapter, without --merged."
        )

    import torch

    from hfkd.loading import load_adapter, load_causal_lm

    config = read_adapter_config(folder)
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    own = folder / BASE
    if own.is_dir():
        named, revision = str(own), None
    dtype = student.get("dtype") or "auto"
    with torch.random.fork_rng(devices=[]):
        base = load_causal_lm(str(named), "the base of the adapter,", revision=revision, dtype=dtype)
        merged = load_adapter(base, folder).merge_and_unload(safe_merge=True)
    merged.save_pretrained(out)
