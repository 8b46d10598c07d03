"""Every single answer of an evaluation as a line of JSON, so that two runs can be compared item by item.

A question isn't kept, only a hash of it with its gold answer: who holds the data finds the item, who doesn't learns
nothing of the prompt. Knows nothing of models or of how many runs there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfkd.data.messages import Row, prompt_key
from hfkd.eval.k_shot import KShotReport, gold_answer
from hfkd.files import write_whole
from hfkd.masking import shareable

PREDICTIONS_NAME = "predictions.jsonl"
_KINDS = {"task": str, "stage": str, "shots": int, "item": str, "gold": str, "prediction": str, "text": str}
_KINDS |= {"right": bool}


def item_hash(row: Row) -> str:
    """16 hex digits that stand for an item: its prompt, as `prompt_key` reads it, and its gold answer."""
    return hashlib.sha256(f"{prompt_key(row)}\0{gold_answer(row)}".encode()).hexdigest()[:16]


def prediction_lines(task: str, stage: str, report: KShotReport, items: Sequence[Row]) -> list[dict[str, Any]]:
    """One line for each item and number of demonstrations.

    Args:
        task: Name of the task; of a path on this machine only the last part is kept.
        stage: Whose answers these are: `before`, `after`, `gold`, `teacher`.
        report: What the model scored.
        items: The rows that were asked, in their order.

    Returns:
        `task`, `stage`, `shots`, `item`, `gold`, `prediction` (empty where none was found), `text` and `right` of
        each.

    Raises:
        ValueError: The report is of another number of items, or has no texts.
    """
    items, name = list(items), shareable(task)  # as the report of a run has it
    asked = [(item_hash(row), gold_answer(row)) for row in items]
    lines = []
    for shots, result in report.results.items():
        if len(result.texts) != len(items) or len(result.right) != len(items):
            raise ValueError(
                f"The {shots}-shot result of {name} has {len(result.texts)} texts and there are {len(items)} items; "
                "expected one for each. Pass the items that `evaluate_k_shot` was given."
            )
        for (item, gold), prediction, text, right in zip(
            asked, result.predictions, result.texts, result.right, strict=True
        ):
            lines.append(
                {"task": name, "stage": stage, "shots": shots, "item": item, "gold": gold}
                | {"prediction": prediction, "text": text, "right": bool(right)}
            )
    return lines


def write_predictions(path: str | Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """Write the lines of `prediction_lines`, whole or not at all, and return the path."""
    text = "".join(json.dumps(dict(line), ensure_ascii=False) + "\n" for line in lines)
    write_whole(path, text)
    return Path(path)


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a file that `write_predictions` wrote.

    Raises:
        OSError: There is no such file.
        ValueError: A line is damaged or of another kind; names it.
    """
    found = []
    with Path(path).open(encoding="utf-8") as stream:
        for number, text in enumerate(stream, 1):
            try:
                found.append(checked_line(json.loads(text)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}; expected a file that hfkd wrote") from None
    return found


def checked_line(line: Any) -> dict[str, Any]:
    """A line as it is.

    Raises:
        ValueError: It lacks a field, or holds another kind of value there.
    """
    if not isinstance(line, dict):
        raise ValueError(f"got a {type(line).__name__}, not a prediction with its fields")
    for name, kind in _KINDS.items():
        if type(line.get(name)) is not kind:
            raise ValueError(f"{name} is {line.get(name)!r}, not a {kind.__name__}")
    return line
