"""The model under an adapter: what it is called on the hub, and what to do where that isn't known.

An adapter is loaded onto the model that `adapter_config.json` names. A folder of this machine says nothing to anybody
else, so it is never uploaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hfkd.uploads.contents import check_data, masked_text
from hfkd.uploads.files import TOKENIZER, WEIGHTS, Upload, collect, owned_by
from hfkd.uploads.repositories import Target

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


def find_base(
    folder: Path,
    repo_id: str,
    run: Mapping[str, Any],
    given: str | None = None,
    base_repo: str | None = None,
    finish: Callable[[str], str] = str,
) -> Base:
    """What is under the adapter in a folder.

    Args:
        folder: Of the run.
        repo_id: Where the adapter goes.
        run: What `run.json` says; empty where there is none.
        given: The id that the caller gives.
        base_repo: Where a base that was cut out goes; None adds `-base` to `repo_id`.
        finish: What is done to the text of that repository's page at last.

    Raises:
        ValueError: The adapter's own file names a folder, and neither the caller nor the run says better; or there is
            no base that could go to `base_repo`.
    """
    if base_repo is not None and (given is not None or not (folder / BASE).is_dir()):
        raise ValueError(
            f"--base-repo is where the base in {folder / BASE} goes, and "
            f"{'--base names one that is on the hub' if given else 'that folder is not there'}; leave it out."
        )
    if given is not None:
        return Base(given)
    if (folder / BASE).is_dir():
        uploads = _files_of_base(folder / BASE, repo_id, run, finish)
        target = base_target(repo_id, base_repo, uploads)
        return Base(target.repo_id, target)
    named = read_adapter_config(folder).get("base_model_name_or_path")
    if not is_on_hub(named, run):
        raise ValueError(f"{folder / ADAPTER_CONFIG}: {no_base(named)}")
    return Base(named)


def base_target(repo_id: str, base_repo: str | None = None, uploads: Sequence[Upload] = ()) -> Target:
    """The repository of a base that was cut out; one whose name the user didn't choose must be of this very adapter.

    Args:
        repo_id: Where the adapter goes.
        base_repo: As for `find_base`.
        uploads: Its files.
    """
    owned = owned_by(uploads)
    if base_repo is not None:
        return Target(base_repo, uploads, owned=owned)
    return Target(f"{repo_id}-base", uploads, owned=owned, mark=_title(repo_id), option="--base-repo OWNER/NAME")


def _title(repo_id: str) -> str:
    return f"# The base of {repo_id}\n"


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


def adapter_config_for(folder: Path, base: Base, revision: str | None = None) -> Upload:
    """`adapter_config.json` as it is uploaded: it names the base by its id on the hub, and the run's file stays.

    Args:
        folder: Of the run.
        base: As `find_base` gives it.
        revision: The branch that adapter and base are sent to; a base that is on the hub keeps its own.
    """
    known = read_adapter_config(folder)
    if base.target is None and known.get("base_model_name_or_path") == base.name:
        return Upload(ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
    # The branch of another base would be none of this one.
    changed = {**known, "base_model_name_or_path": base.name, "revision": revision if base.target else None}
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


def _files_of_base(folder: Path, repo_id: str, run: Mapping[str, Any], finish: Callable[[str], str]) -> list[Upload]:
    student = (run.get("recipe") or {}).get("student") or {}
    origin = (student.get("init") or {}).get("from") or student.get("model")
    of = f" of `{origin}`" if isinstance(origin, str) and is_on_hub(origin, run) else " of a larger model"
    page = (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- hfkd\n---\n\n"
        f"{_title(repo_id)}\nA part{of}, as it was cut out, before any training. It is here because the "
        f"adapter [{repo_id}](https://huggingface.co/{repo_id}) is loaded onto it; by itself it is of no use.\n"
    )
    return [Upload("README.md", finish(masked_text(page)).encode()), *collect(folder, (*WEIGHTS, *TOKENIZER))]
