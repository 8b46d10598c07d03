"""Loading a causal LM so that it is whole: safetensors, every weight there, and one sentence where a file is damaged.

Code of a model's repository runs only where the caller says `trust_remote_code=True`, and nobody is asked at the
terminal; pickled weights, which can run code too, are never read. It doesn't know whether the model is to learn or to
teach.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

logger = logging.getLogger(__name__)

# What of a model's loading arguments says where its tokenizer and its configuration are found, too.
_WHERE = (
    *("revision", "trust_remote_code", "code_revision"),
    *("gguf_file", "subfolder", "token", "cache_dir", "local_files_only"),
)
_FOUND = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})(?:/|$)")
KERNEL_OPTIONS = ("use_kernels", "allow_all_kernels", "kernel_config")
"""Loading arguments that have code of the hub take the place of a model's layers."""
_CONVERT = (
    "Pickled weights can run code when they are read, so only safetensors are. Convert them where you trust the file: "
    "load it with its own library, and `save_pretrained` it"
)


def load_causal_lm(name: str, what: str = "the model", **options: Any) -> PreTrainedModel:
    """Load a model by its hub id or folder.

    Args:
        name: Hub id or folder.
        what: Begins the message of an error: "the teacher", say.
        options: Of `from_pretrained`. Weights are read from safetensors, or from the `gguf_file` that is among them.

    Raises:
        OSError: It can't be found, has pickled weights only, a file is truncated or damaged, or weights are missing.
        ValueError: Pickled weights are asked for, or a kernel of the hub without `trust_remote_code`.
    """
    what = f"{what} {name}"
    if options.get("use_safetensors") is False:
        raise ValueError(f"{what}: use_safetensors is off; leave it out. {_CONVERT}.")
    options = {"trust_remote_code": False, **options}  # None would ask at the terminal
    _refuse_foreign_kernel(options, what)
    if not options.get("gguf_file"):
        options["use_safetensors"] = True
        _refuse_pickles(Path(name) / (options.get("subfolder") or ""), what)
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


def fetch(name: str, options: Mapping[str, Any]) -> None:
    """Download a model's weights without reading them. What can't be found isn't missed here: loading says more.

    Args:
        name: The model's hub id; of a folder there is nothing to download.
        options: The arguments that the model is loaded with.
    """
    if Path(name).is_dir() or options.get("variant"):
        return
    where = {key: value for key, value in _located(options).items() if key in _FOUND}
    try:
        if one := options.get("gguf_file"):
            cached_file(name, one, **where)
        elif cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **where) is None:
            index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **where)
            get_checkpoint_shard_files(name, index, **where)
    except OSError as error:
        logger.debug("%s isn't downloaded beforehand: %s", name, error)


def load_config_of(name: str, options: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Read a model's configuration without its weights.

    Args:
        name: The model's hub id or folder.
        options: The arguments that the model is loaded with.
    """
    return AutoConfig.from_pretrained(name, **_located(options))


def load_tokenizer_of(name: str, options: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model.

    Args:
        name: The model's hub id or folder.
        options: The arguments that the model is loaded with; those that say where it is found serve here as well.
    """
    return AutoTokenizer.from_pretrained(name, **_located(options))


def commit_of(name: str, options: Mapping[str, Any] | None = None) -> str | None:
    """The commit of the hub that a loaded model is of, by where its files lie in the local cache. Asks nobody.

    Args:
        name: The model's hub id or folder.
        options: The arguments that the model was loaded with.

    Returns:
        40 hex digits; None for a folder that is no snapshot of the hub, and for a model that isn't in the cache.
    """
    given = options or {}
    inside = f"{given['subfolder']}/" if given.get("subfolder") else ""
    files = [f"{inside}{file}" for file in (given.get("gguf_file"), "config.json") if file]
    try:
        if Path(name).exists():
            return _commit_in(Path(name))
        found = [
            try_to_load_from_cache(name, file, cache_dir=given.get("cache_dir"), revision=given.get("revision"))
            for file in files
        ]
    except (OSError, ValueError):  # no id at all, or a cache that can't be read
        return None
    return next((_commit_in(Path(path)) for path in found if isinstance(path, str)), None)


def load_adapter(model: nn.Module, folder: Path, name: str = "default") -> nn.Module:
    """Put a trained adapter on a model, beside those that are on it.

    Args:
        model: What the adapter was trained on.
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
        name: What the model calls it.

    Raises:
        OSError: Its weights are pickled, or a file is missing or damaged.
    """
    from peft import PeftModel

    what = f"the adapter in {folder}" if name == "default" else f"the adapter {name!r} in {folder}"
    _refuse_pickles(folder, what)
    if isinstance(model, PeftModel):
        readable(lambda: model.load_adapter(str(folder), adapter_name=name), what)
        return model
    return readable(lambda: PeftModel.from_pretrained(model, str(folder), adapter_name=name), what)


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


def _commit_in(path: Path) -> str | None:
    """The commit in a path of the hub's cache."""
    found = _SNAPSHOT.search(path.absolute().as_posix())
    return found[1] if found else None


def _located(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of a model's loading arguments those that hold for the other files beside it."""
    kept = {name: value for name, value in (options or {}).items() if name in _WHERE}
    return {"trust_remote_code": False, **kept}


def _refuse_pickles(folder: Path, what: str) -> None:
    """Refuse a folder with pickled weights that have no counterpart in safetensors; whole models and adapters apart,
    because one folder may hold both.

    Raises:
        OSError: Names the files.
    """
    if not folder.is_dir():
        return
    for stem in ("pytorch_model", "adapter_model"):
        pickled = sorted(path.name for path in folder.glob(f"{stem}*.bin"))
        wanted = "model*.safetensors" if stem == "pytorch_model" else f"{stem}*.safetensors"
        if pickled and not any(folder.glob(wanted)):
            raise OSError(f"{what} has pickled weights only ({', '.join(pickled[:3])}). {_CONVERT}")


def _refuse_foreign_kernel(options: Mapping[str, Any], what: str) -> None:
    """An attention that is named like a repository is code of the hub, and so is what takes the place of layers.

    Raises:
        ValueError: Code of repositories isn't trusted.
    """
    for name in KERNEL_OPTIONS:
        if options.get(name) and not options["trust_remote_code"]:
            raise ValueError(
                f"{what}: {name} lets code of the hub run; set trust_remote_code to true beside it if you trust that "
                "code and the model's, or leave it out"
            )
    named = options.get("attn_implementation")
    kernels = [one for one in (named.values() if isinstance(named, Mapping) else [named]) if "/" in str(one)]
    if kernels and not options["trust_remote_code"]:
        raise ValueError(
            f"{what}: attn_implementation {kernels[0]} is code of the hub; set trust_remote_code to true beside it if "
            "you trust that code and the model's, or take sdpa or flash_attention_2"
        )
