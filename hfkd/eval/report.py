"""The report of a run as JSON, and how each file of a report is written: whole or not at all.

Knows nothing of models or of how the figures were made; it takes them as plain values.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from hfkd.card.results import other_tasks


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
    write_whole(Path(path), lambda stream: stream.write(text.encode("utf-8")))


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


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a neighbour of the file first, and put it in the file's place when it is on the disk.

    Args:
        path: The file; its folder is made if need be.
        write: Writes the content into a stream of bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
