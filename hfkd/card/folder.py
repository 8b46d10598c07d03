"""A run's folder as far as it is there: what can be read of it, what can't, and the card that is written into it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hfkd.card.build import build_card
from hfkd.card.marker import is_untouched
from hfkd.card.reading import section
from hfkd.card.words import has_adapter, is_adapter
from hfkd.files import write_whole

CARD_NAME = "README.md"
_ADAPTER = frozenset({"adapter_model.safetensors"})
_WHOLE = frozenset({"model.safetensors", "model.safetensors.index.json"})
_LOST = {
    "run.json": "revisions, licences, versions, hardware, time and the digests of the data aren't known",
    "report.json": "no results",
    "recipe.yaml": "the command that makes it again needs it",
    "adapter_config.json": "without it the adapter can't be loaded",
}
_NEWER = {
    "run": {
        "origins": "revisions and licences of student, teacher and data",
        "energy": "the energy that was used",
        "parameters": "the number of parameters",
    },
    "report": {"fidelity": "fidelity to the teacher, and calibration"},
}


class CardError(ValueError):
    """There is nothing to make a card from, or a card that a person has changed would be lost."""


class FolderRun(NamedTuple):
    """What a folder holds: run.json, report.json, the files as paths in it, and what isn't there, in words."""

    run: dict[str, Any]
    report: dict[str, Any]
    files: list[str]
    missing: list[str]


def card_of_folder(folder: str | Path, *, merged: bool = False) -> tuple[str, list[str]]:
    """The card of a run, from whatever files of it are there.

    Args:
        folder: The run's output folder, or a copy of it.
        merged: The card is for the adapter merged into its base, a whole model.

    Returns:
        The card's text, and what it lacks, one line each.

    Raises:
        CardError: The folder isn't there, or holds nothing that says anything about a model.
    """
    found = read_run(folder)
    return build_card(found.run, found.report, files=found.files, missing=found.missing, merged=merged), found.missing


def read_run(folder: str | Path) -> FolderRun:
    """Read a run's folder, damaged or incomplete as it may be.

    Raises:
        CardError: As for `card_of_folder`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise CardError(f"{folder} is {what}; expected the output folder of a run")
    missing: list[str] = []
    run, report, recipe, adapter = (_read(folder / name, missing) for name in _LOST)
    if not (run or report or recipe or adapter):
        lost = "; ".join(line for line in missing) or "they are empty"
        raise CardError(
            f"{folder} holds nothing to make a card from: of {', '.join(_LOST)} none can be used ({lost}). Give the "
            "output folder of a run."
        )
    if not section(run, "recipe") and recipe:
        run = {**run, "recipe": recipe}
    files = _files(folder)
    if adapter:
        run = {**run, "adapter": adapter}
    elif not has_adapter(run) or not _ADAPTER & set(files) and _WHOLE & set(files):
        run = {**run, "merged": has_adapter(run)}
        missing = [line for line in missing if not line.startswith("adapter_config.json: not there")]
    missing += [*_lacking(run, report), *_weights(run, files)]
    return FolderRun(run, report, files, missing)


def _read(path: Path, missing: list[str]) -> dict[str, Any]:
    """What a file holds; empty where it can't be used, and then `missing` says so."""
    try:
        words = path.read_text(encoding="utf-8")
        found = yaml.safe_load(words) if path.suffix == ".yaml" else json.loads(words)
    except FileNotFoundError:
        missing.append(f"{path.name}: not there ({_LOST[path.name]})")
        return {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(getattr(error, "problem", None) or getattr(error, "msg", None) or error).split())
        missing.append(f"{path.name}: damaged, {reason or type(error).__name__} ({_LOST[path.name]})")
        return {}
    if not isinstance(found, dict):
        missing.append(f"{path.name}: holds {type(found).__name__}, not keys with values ({_LOST[path.name]})")
        return {}
    return found


def _lacking(run: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """What files that are there don't say: older versions wrote less."""
    lines = []
    for name, whole in (("run", run), ("report", report)):
        if not whole or set(whole) <= {"recipe", "adapter", "merged"}:
            continue
        lines += [f"{name}.json has no {key}: {what}" for key, what in _NEWER[name].items() if key not in whole]
    return lines


def _weights(run: Mapping[str, Any], files: list[str]) -> list[str]:
    """Weights and tokenizer, without which the code on the card loads nothing."""
    wanted = _ADAPTER if is_adapter(run) else _WHOLE
    lines = [] if wanted & set(files) else [f"{min(wanted)}: not there (the weights lie elsewhere)"]
    return lines + ([] if "tokenizer_config.json" in files else ["tokenizer_config.json: not there (no tokenizer)"])


def _files(folder: Path) -> list[str]:
    """The files at the top of the folder, and the pictures."""
    found = [path.name for path in folder.iterdir() if path.is_file()]
    plots = folder / "plots"
    if plots.is_dir():
        found += [f"plots/{path.name}" for path in plots.iterdir() if path.is_file()]
    return sorted(found)


def write_card(path: str | Path, card: str, *, overwrite: bool = False) -> Path:
    """Write a card, whole or not at all, unless that would lose what a person wrote.

    Args:
        path: The file; its folder is made if need be.
        card: From `build_card`.
        overwrite: Lose it.

    Raises:
        CardError: There is a card that isn't as it was written, or that was never written here.
    """
    path = Path(path)
    if path.exists() and not overwrite and not is_untouched(_present(path)):
        raise CardError(
            f"{path} was changed by hand, or by another program, since it was written; nothing is changed. Write the "
            "card elsewhere with --out, or lose that one with --overwrite"
        )
    return write_whole(path, card)


def _present(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
