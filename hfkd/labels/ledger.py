"""What was asked and what came back, a line of JSON each, written as it comes: a killed run loses no answer.

Knows a file and its lines. A line that a kill tore in two is cut off; a line that is damaged otherwise is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hfkd.files import held

LEDGER_NAME = "ledger.jsonl"


@dataclass
class Entry:
    """One question: all its attempts, and how they ended.

    Attributes:
        key: Of what was asked, see `question_key`.
        text: The answer; None where all attempts failed.
        reason: Why they failed, the last one in words; empty for an answer.
        attempts: Requests that were sent.
        faults: How many of them failed, by kind.
        prompt_tokens: Of all attempts, as the endpoint counted them.
        completion_tokens: The same.
        uncounted: Attempts whose tokens the endpoint didn't say.
        malformed: The last text that wasn't in the form that was asked for.
    """

    key: str
    text: str | None = None
    reason: str = ""
    attempts: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    malformed: str | None = None

    @property
    def kind(self) -> str:
        """The kind of the last fault; empty for an answer."""
        return self.reason.partition(":")[0]


@dataclass
class Totals:
    """Sums over all lines of a ledger, those of earlier runs too."""

    requests: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0

    def add(self, entry: Entry) -> None:
        """Count a line."""
        self.requests += entry.attempts
        self.faults.update(entry.faults)
        self.prompt_tokens += entry.prompt_tokens
        self.completion_tokens += entry.completion_tokens
        self.uncounted += entry.uncounted


def question_key(model: str, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], sample: int) -> str:
    """Hex digits that stand for a question: the model's name, what it reads, how it writes, and which sample it is."""
    asked = {"model": model, "messages": list(messages), "settings": dict(settings), "sample": sample}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


class Ledger:
    """A JSONL file of entries. Use it within `alone`.

    Args:
        path: The file; it need not exist.

    Attributes:
        answers: Entries with an answer, by key; the last of a key counts.
        failed: Of questions that were asked and have none, the kinds of fault that they were left with, by key.
        totals: Over all lines.

    Raises:
        ValueError: A line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Entry] = {}
        self.failed: dict[str, set[str]] = {}
        self.totals = Totals()
        self._lock = threading.Lock()
        self._whole_bytes = 0
        if path.exists():
            self._load()

    def append(self, entry: Entry) -> None:
        """Write an entry, so that it is on the disk when this returns.

        Raises:
            OSError: It can't be written; a half line is cut off by the next run.
        """
        line = (json.dumps(asdict(entry), ensure_ascii=False) + "\n").encode("utf-8", errors="replace")
        with self._lock:
            with self.path.open("ab") as stream:
                stream.truncate(self._whole_bytes)
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            self._whole_bytes += len(line)
            self._take(entry)

    def _load(self) -> None:
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                return  # torn by a kill; the next line takes its place
            try:
                self._take(_entry(json.loads(line)))
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"Line {number} of {self.path} is damaged ({error}). Take the line out, and its question is asked "
                    "again; or choose another output_dir."
                ) from None
            self._whole_bytes += len(line)

    def _take(self, entry: Entry) -> None:
        self.totals.add(entry)
        if entry.text is None:
            self.failed.setdefault(entry.key, set()).add(entry.kind)
        else:
            self.answers[entry.key] = entry
            self.failed.pop(entry.key, None)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder while it is written; it is made if need be.

    Raises:
        ValueError: Another run holds it, or it is a file.
    """
    no_folder = ValueError(f"output_dir: {folder} is a file, or lies below one; expected a folder")
    busy = ValueError(f"Another `hfkd label` writes into {folder}; wait for its end, or choose another.")
    with held(folder / ".label.lock", no_folder=no_folder, busy=busy):
        yield


def _entry(found: Any) -> Entry:
    entry = Entry(**found)
    counts = (entry.attempts, entry.prompt_tokens, entry.completion_tokens, entry.uncounted, *entry.faults.values())
    if not isinstance(entry.key, str) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("a field of it is of another kind")
    return entry
