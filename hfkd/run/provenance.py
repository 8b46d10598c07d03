"""What a result came from besides settings and weights: code of the user's own and versions, and whether the rows and
the model that were found are those of the run that is evaluated.

Compares what a run wrote down with what is here now; loads no weights, and asks nobody anything.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkd.files import file_digest
from hfkd.named import import_named
from hfkd.recipe.own_code import own_code
from hfkd.recipe.schema import Recipe, StudentSection
from hfkd.record import RECORD_NAME, package_versions, read_record, rows_fingerprint
from hfkd.run.expected import name_of

if TYPE_CHECKING:
    from hfkd.run.build import Run

ROWS, MODEL = "rows", "model"
_VERSIONS = ("hfkd", "torch", "transformers")
_OF_TRAINING = re.compile(r"data\.(sampler|revise|transforms)(\..*)?")
_CHOOSES = {
    ROWS: re.compile(
        r"data(\.(train|demonstrations|whole_text)(\..*)?)?"
        r"|evaluation(\.(path|name|split|format|columns|revision|options|size|seed)(\..*)?)?"
    ),
    MODEL: re.compile(r"student(\.(model|init|revision|load_kwargs)(\..*)?)?"),
}
_AS_FOUND = "add --as-found to take what is here all the same"


def deciding_versions() -> dict[str, str]:
    """The versions of the packages that decide what a model says and how its answers are read."""
    found = package_versions()
    return {name: found[name] for name in _VERSIONS if name in found}


def deciding_code(recipe: Recipe, sections: Collection[str]) -> dict[str, Any]:
    """The user's own code that decides a result: by key its name, and a digest of each file that it is written in.

    Modules that these files import aren't followed. What chooses and changes training rows decides the weights, and
    nothing of a text that is held out; its arguments may be texts that only look like names.

    Args:
        recipe: Names the code.
        sections: What the keys begin with that matter.

    Raises:
        ValueError: It can't be imported.
    """
    return {
        key: [name, *map(file_digest, _sources(name, key))]
        for key, name in own_code(recipe).items()
        if not _OF_TRAINING.fullmatch(key)
        and any(key == section or key.startswith(f"{section}.") for section in sections)
    }


def chosen_by(overrides: Iterable[str], everything: bool = False) -> set[str]:
    """Which of `rows` and `model` the user chose: by the keys of each `section.key=value`, or all at once."""
    keys = [override.partition("=")[0].strip() for override in overrides]
    return {part for part, chooses in _CHOOSES.items() if everything or any(map(chooses.fullmatch, keys))}


def check_model(folder: Path, recipe: Recipe, chosen: Collection[str]) -> list[str]:
    """Hold the model that the recipe names against the one that the run began with, as far as its record knows.

    Args:
        folder: Of the run.
        recipe: Its own, with the overrides of the evaluation.
        chosen: Of `rows` and `model` what may be another one.

    Returns:
        What the user is to be told.

    Raises:
        ValueError: It is another one, and wasn't chosen; or the record is damaged.
    """
    key = recipe.student.origin_key
    faults = list(_other_model(_record(folder).get("student") or {}, recipe.student))
    if faults and MODEL not in chosen:
        raise ValueError(
            f"{faults[0]}. Give the run's own with {key}=NAME, or evaluate from the folder that it was started in; "
            f"{_AS_FOUND}"
        )
    return faults


def check_rows(folder: Path, run: Run, chosen: Collection[str]) -> list[str]:
    """Hold the rows that were loaded against those that the run was asked. Takes and gives as `check_model`.

    Raises:
        ValueError: They are others, and weren't chosen; or the record is damaged.
    """
    known = _record(folder).get("data") or {}
    loaded = {"demonstrations": run.demonstrations}
    if run.evaluation is not None:
        loaded["evaluation"] = run.evaluation.items
    faults = []
    for name, rows in sorted(loaded.items(), reverse=True):
        found, before = rows_fingerprint(rows), known.get(name)
        if before is not None and before != found:
            faults.append(
                f"the {name} rows that were found aren't those of the run in {folder} ({_shown(found)}; the run had "
                f"{_shown(before)})"
            )
    if faults and ROWS not in chosen:
        raise ValueError(
            f"{faults[0]}. data.train.path is {run.recipe.data.train.path}, as seen from the working folder. Give the "
            "run's own file with data.train.path=FILE (or data.demonstrations.path, evaluation.path), or evaluate "
            f"from the folder that it was started in; {_AS_FOUND}"
        )
    return faults


def _other_model(known: Mapping[str, Any], student: StudentSection) -> Iterator[str]:
    origin, source = student.origin, known.get("source")
    here = "folder" if Path(origin).exists() else "hub"
    words = {"folder": "in a folder", "hub": "from the hub"}
    if source in words and source != here:
        place = "is no folder here" if here == "hub" else "is a folder here"
        yield f"the run read its {student.origin_key} {words[source]}, and {origin} {place}"
    elif known.get("weights") and here == "folder":
        found = name_of(origin, student.load_kwargs.get("subfolder"))
        if found.rpartition("@")[2] != str(known["weights"]).rpartition("@")[2]:
            yield f"the student's model isn't the one of the run: {found} was found, the run had {known['weights']}"


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = read_record(folder)
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    raise ValueError(f"{folder / RECORD_NAME} is damaged; mend it, or take it away: rows aren't compared then")


def _shown(rows: Any) -> str:
    known = rows if isinstance(rows, Mapping) else {}
    return f"{known.get('rows', '?')} rows, sha256 {str(known.get('sha256'))[:12]}"


def _sources(name: str, key: str) -> list[Path]:
    """The file of the module, and the one that what it names is defined in, where that is another."""
    found = import_named(name, key)
    files = [getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)]
    try:
        files.append(inspect.getsourcefile(inspect.unwrap(found)))
    except (TypeError, ValueError):  # an object that has no source of its own
        pass
    return [Path(path) for path in dict.fromkeys(files) if path is not None and Path(path).is_file()]
