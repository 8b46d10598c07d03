"""The model under an adapter: what it is called on the hub, and what to do where that isn't known.

An adapter is loaded onto the model that `adapter_config.json` names. A folder of this machine says nothing to anybody
else, so it is never uploaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hfkd.uploads.contents import check_data
from hfkd.uploads.files import TOKENIZER, WEIGHTS, Upload, collect
from hfkd.uploads.sending import Target

ADAPTER_CONFIG = "adapter_config.json"
BASE = "base"
"""The folder, in that of a run, of a base that was cut out of a larger model."""


@dataclass(frozen=True)
class Base:
    """The model under an adapter.

    Attributes:
        name: Its id on the hub, as the uploaded `adapter_config.json` names it.
        target: The repository that it is sent to; None where it is on the hub already.
    """

    name: str
    target: Target | None = None


def find_base(folder: Path, repo_id: str, run: Mapping[str, Any], given: str | None = None) -> Base:
    """What is under the adapter in a folder.

    Args:
        folder: Of the run.
        repo_id: Where the adapter goes.
        run: What `run.json` says; empty where there is none.
        given: The id that the caller gives.

    Raises:
        ValueError: The adapter's own file names a folder, and neither the caller nor the run says better.
    """
    if given is not None:
        return Base(given)
    if (folder / BASE).is_dir():
        name = f"{repo_id}-base"
        return Base(name, Target(name, _files_of_base(folder / BASE, repo_id, run), owned=WEIGHTS))
    named = read_adapter_config(folder).get("base_model_name_or_path")
    if not is_on_hub(named, run):
        raise ValueError(f"{folder / ADAPTER_CONFIG}: {no_base(named)}")
    return Base(named)


def no_base(named: Any) -> str:
    """What is wrong with the name of an adapter's base that isn't on the hub, and what to do.

    Args:
        named: What the adapter says.
    """
    on = "on a model in a folder of this machine, which nobody else has" if named else "on a model without a name"
    return (
        f"the adapter belongs {on}, so nothing was uploaded. Give the id that this model has on the hub (`hfkd push "
        "FOLDER OWNER/NAME --base OWNER/BASE`), or push the whole model (`--merged`)."
    )


def adapter_config_for(folder: Path, base: Base) -> Upload:
    """`adapter_config.json` as it is uploaded: it names the base by its id on the hub, and the run's file stays."""
    known = read_adapter_config(folder)
    if known.get("base_model_name_or_path") == base.name:
        return Upload(ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
    changed = {**known, "base_model_name_or_path": base.name}
    if base.target is not None:
        changed["revision"] = None
    check_data(folder / ADAPTER_CONFIG, changed)
    return Upload(ADAPTER_CONFIG, (json.dumps(changed, indent=2) + "\n").encode(), "the name of the base model")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` says.

    Raises:
        ValueError: It is damaged.
    """
    try:
        return dict(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} is missing or damaged; expected the folder of a LoRA run."
        ) from None


def is_on_hub(name: Any, run: Mapping[str, Any]) -> bool:
    """Whether a model's name is an id of the hub. `models/small` could be either, so where the run says what it was,
    that counts; otherwise it is a folder if there is one.

    Args:
        name: As it stands in a configuration; None is no id.
        run: What `run.json` says; empty where there is none.
    """
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    source = ((run.get("origins") or {}).get("student") or run.get("student") or {}).get("source")
    return source == "hub" if source else not Path(name).exists()


def _files_of_base(folder: Path, repo_id: str, run: Mapping[str, Any]) -> list[Upload]:
    student = (run.get("recipe") or {}).get("student") or {}
    origin = (student.get("init") or {}).get("from") or student.get("model")
    of = f" of `{origin}`" if isinstance(origin, str) and is_on_hub(origin, run) else " of a larger model"
    page = (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- hfkd\n---\n\n"
        f"# The base of {repo_id}\n\nA part{of}, as it was cut out, before any training. It is here because the "
        f"adapter [{repo_id}](https://huggingface.co/{repo_id}) is loaded onto it; by itself it is of no use.\n"
    )
    return [Upload("README.md", page.encode()), *collect(folder, (*WEIGHTS, *TOKENIZER))]
