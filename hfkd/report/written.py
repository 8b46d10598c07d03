"""The report of a run as JSON, and the names of its pictures.

Knows nothing of models or of how the figures were made; it takes them as plain values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfkd.card.results import other_tasks
from hfkd.files import write_whole


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON, whole or not at all: nobody reads half of one, and a failure keeps the one before.

    Args:
        path: The file; its folder is made if need be.
        report: JSON values.

    Raises:
        TypeError: The report holds something that is no JSON value.
        ValueError: The report holds NaN or infinity, which JSON has no word for.
    """
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, text)


def accuracy_pictures(report: Mapping[str, Any]) -> list[str]:
    """The names of the pictures of the accuracies: that of the trained task, and one for each other task.

    Args:
        report: What `report.json` holds. A task's name may hold anything; that of its picture is a plain file name.
    """
    names = ["accuracy.png"]
    for task, _ in other_tasks(report):
        words = re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-")[:40] or "task"
        taken = sum(bool(re.fullmatch(rf"accuracy-{words}(-\d+)?\.png", name)) for name in names)
        names.append(f"accuracy-{words}{f'-{taken + 1}' if taken else ''}.png")
    return names
