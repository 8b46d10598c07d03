"""The JSON file of `hfkd evaluate`: each task's result is in it as soon as it is done, and isn't made a second time.

A result is found again by a fingerprint of all that decides it (settings, rows, weights), which the caller makes. The
file is written whole or not at all. Knows no model and no task.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfkd.report.written import write_report

KIND, SCHEMA = "hfkd evaluation", 1


class Results:
    """What was measured so far: `results[stage][task]` holds `fingerprint`, `seconds` and `result`.

    Args:
        path: The file; None keeps all in memory.
        weights: Fingerprint of each stage's weights; results of other weights in the file are dropped.

    Raises:
        ValueError: The file is of another kind, or damaged.
        OSError: It can't be read or written.

    Attributes:
        document: What the file holds.
        dropped: Stages whose results in the file were of other weights.
    """

    def __init__(self, path: Path | None, weights: Mapping[str, str]) -> None:
        self.path = path
        self.document: dict[str, Any] = {"kind": KIND, "schema": SCHEMA, "weights": {}, "results": {}}
        self.dropped: list[str] = []
        if path is not None and path.exists():
            self._take(read_results(path), weights)
        elif path is not None:
            self._write()  # a file that can't be written is known now, and not in an hour
        self.document["weights"] |= dict(weights)

    def known(self, stage: str, task: str, fingerprint: str) -> dict[str, Any] | None:
        """The result of a task, if it was made with the same fingerprint."""
        entry = self.document["results"].get(stage, {}).get(task)
        return entry["result"] if entry is not None and entry["fingerprint"] == fingerprint else None

    def put(self, stage: str, task: str, fingerprint: str, result: Mapping[str, Any], seconds: float) -> None:
        """Keep a result, and write the file.

        Raises:
            ValueError: The result holds NaN or infinity.
        """
        entry = {"fingerprint": fingerprint, "seconds": round(seconds, 2), "result": dict(result)}
        stages = self.document["results"]
        self.document["results"] = {**stages, stage: {**stages.get(stage, {}), task: entry}}
        self._write()

    def _take(self, found: Mapping[str, Any], weights: Mapping[str, str]) -> None:
        for stage, tasks in found["results"].items():
            if stage in weights and found["weights"].get(stage) != weights[stage]:
                self.dropped.append(stage)
                continue
            self.document["results"][stage] = tasks
            self.document["weights"][stage] = found["weights"].get(stage)

    def _write(self) -> None:
        if self.path is not None:
            write_report(self.path, self.document)


def fingerprint_of(deciding: Any) -> str:
    """16 hex digits of plain data, the same for the same data whatever the order of its keys."""
    text = json.dumps(deciding, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_results(path: Path) -> dict[str, Any]:
    """What `hfkd evaluate --json` wrote.

    Raises:
        ValueError: The file is of another kind, damaged, or of a newer version.
        OSError: It can't be read.
    """
    advice = f"expected a file that `hfkd evaluate --json` wrote, and {path} is left as it is; name another file"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is no JSON: {advice}") from None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise ValueError(f"{path} is JSON of another kind: {advice}")
    if found.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} has version {found.get('schema')!r} of this kind of file, and this hfkd knows {SCHEMA}: {advice}"
        )
    if not _sound(found):
        raise ValueError(f"{path} is damaged: {advice}")
    return found


def _sound(found: Mapping[str, Any]) -> bool:
    """Whether all that is read later is there."""
    stages = found.get("results")
    if not isinstance(stages, dict) or not isinstance(found.get("weights"), dict):
        return False
    entries = [entry for tasks in stages.values() for entry in (tasks.values() if isinstance(tasks, dict) else [None])]
    return all(isinstance(entry, dict) and {"fingerprint", "result"} <= entry.keys() for entry in entries)
