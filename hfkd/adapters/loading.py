"""Several trained adapters on one model, each by its name, one of them in force at a time.

It doesn't know what an adapter is for, nor what it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hfkd.loading import load_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

_FILES = ("adapter_config.json", "adapter_model.safetensors")


def load_adapters(model: nn.Module, folders: Mapping[str, str | Path]) -> PeftModel:
    """Put trained adapters on a model.

    Args:
        model: The base that all of them were trained on, without an adapter.
        folders: By name the folder of each, with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The model with all adapters, in eval mode; the first one is in force, and none learns.

    Raises:
        ValueError: There are no folders.
        OSError: A file is missing or damaged, or belongs to another model; weights that are pickled aren't read.
    """

    if not folders:
        raise ValueError("got no adapter to load; expected at least one name with its folder")
    adapted = None
    for name, folder in folders.items():
        what = f"the adapter {name!r} in {folder}"
        missing = [file for file in _FILES if not (Path(folder) / file).is_file()]
        if missing:
            raise OSError(f"{what} has no {' and no '.join(missing)}; expected the folder of a finished run")
        adapted = load_adapter(model if adapted is None else adapted, Path(folder), name)
    return adapted.eval()


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters of a model, in the order in which they were loaded; none of a model without any."""
    return list(getattr(model, "peft_config", {}))


def check_names(names: Mapping[str, str], known: list[str]) -> None:
    """Refuse a role whose adapter isn't there.

    Args:
        names: The adapter's name by the role that it is to play.
        known: The adapters that there are.

    Raises:
        ValueError: Names the first one, and those that there are.
    """
    for role, name in names.items():
        if name not in known:
            there = ", ".join(known) if known else "none"
            raise ValueError(f"{role}: there is no adapter {name!r} (known: {there}); name one of those")


@contextmanager
def using(model: PeftModel, name: str) -> Iterator[PeftModel]:
    """Put one adapter in force, and afterwards the one before.

    Args:
        model: From `load_adapters`.
        name: Of the adapter.

    Raises:
        ValueError: There is no such adapter.
    """
    check_names({"adapter": name}, adapter_names(model))
    before = model.active_adapter
    model.set_adapter(name, inference_mode=True)
    try:
        yield model
    finally:
        model.set_adapter(before, inference_mode=True)
