"""What a run expects of a cache: the contract that follows from its recipe, without a model in memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfkd.cache.contract import text_contract
from hfkd.data.views import DistillationDataset
from hfkd.loading import commit_of
from hfkd.masking import mask
from hfkd.objective import Objective
from hfkd.recipe.schema import Recipe
from hfkd.run.build import Run
from hfkd.schedules import all_values, constant_or_schedule
from hfkd.signal import DISTRIBUTION

_SAMPLES, _SAMPLE_BYTES = 64, 4096
_WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model).*\.(safetensors|bin|index\.json)|.*\.gguf")
# Where and how files are fetched and where weights are put, which changes nothing that a model says.
_FETCHING = ("token", "cache_dir", "local_files_only", "device_map", "proxies", "force_download")


def expected_contract(run: Run, dataset: DistillationDataset) -> dict[str, Any]:
    """What the manifest of a cache for this run must say; the codec and the vocabulary are the cache's own business.

    Args:
        run: With its rows and its tokenizer.
        dataset: All rows that can be examples (see `hfkd.run.texts.fitting`).

    Returns:
        A contract for `CachedTeacher(..., expected=..., subset=True)`. Without `data` where the teacher writes the
        answers: which rows are answered follows from the length of the training, and each text is looked up anyway.
    """
    contract = {**text_contract(dataset), "teacher": teacher_contract(run.recipe)}
    if run.recipe.data.answer == "teacher":
        del contract["data"]
    return {**contract, "temperature": loss_temperature(run.objective)}


def teacher_contract(recipe: Recipe) -> dict[str, Any]:
    """Who the teacher of a recipe is.

    Raises:
        ValueError: A teacher of this kind changes, or is none, so that nothing can be kept of it.
    """
    kind, weights = recipe.teacher.kind, recipe.teacher.weights
    if kind not in ("local", "self") or (kind == "self" and weights == "live"):
        named = f"{kind} with weights: live" if kind == "self" else kind
        raise ValueError(
            f"teacher.kind: {named} can't be cached; expected local, or self with weights adapter_off or frozen_copy: "
            "a teacher that says the same at every step"
        )
    section = recipe.student if kind == "self" else recipe.teacher
    origin = recipe.student.origin if kind == "self" else recipe.teacher.model
    contract = {
        "kind": kind,
        "model": name_of(origin, section.load_kwargs.get("subfolder")),
        "revision": section.revision,
        "dtype": section.dtype,
        "load_kwargs": deciding(section.model_dump(mode="json")["load_kwargs"]),
    }
    if kind == "self":
        contract["weights"] = weights
        init = recipe.student.init
        contract["init"] = None if init is None else init.model_dump(mode="json", exclude={"source"})
    given = {**section.load_kwargs, "revision": section.revision}
    commit = None if Path(origin).exists() else commit_of(origin, given)
    return contract if commit is None else {**contract, "commit": commit}


def deciding(load_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The loading arguments that can change what a model says, as they may be written down."""
    return mask({name: value for name, value in load_kwargs.items() if name not in _FETCHING})


def loss_temperature(objective: Objective) -> float | list[float]:
    """The temperature at which the terms read the teacher's distribution; a list where they don't agree, or where it
    changes.
    """
    found: set[float] = set()
    for term in objective.terms:
        value = term.loss.settings().get("temperature")
        if value is not None and DISTRIBUTION in term.loss.needs:
            found |= set(all_values(constant_or_schedule(value, f"{term.name}: temperature")))
    return sorted(map(float, found)) if len(found) > 1 else float(next(iter(found), 1.0))


def name_of(origin: str, subfolder: str | None = None) -> str:
    """A hub id as it is; a folder by its last part and a hash of its weights, so that no machine's path is told.

    Args:
        origin: The hub id or the folder.
        subfolder: In which part of it the weights lie.
    """
    folder = Path(origin)
    if not folder.exists():
        return origin
    return f"{folder.resolve().name}@{_folder_digest(folder.resolve() / (subfolder or ''))[:16]}"


def _folder_digest(folder: Path) -> str:
    """A hash of a model's weights: of each file its name, its size and pieces all over it. What else lies there, a
    configuration that was saved anew too, plays no part.
    """
    digest = hashlib.sha256()
    files = [folder] if folder.is_file() else sorted(folder.iterdir())
    for path in files:
        if path == folder or _WEIGHTS.fullmatch(path.name):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as stream:
                for number in range(_SAMPLES):
                    stream.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                    digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
