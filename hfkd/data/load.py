"""Rows from files, from the hub, and from reasoning-gym, in the columns that the rest of the project knows.

It checks that what training needs is there and says what to change where it isn't. It doesn't know tokenizers, splits
of the rows among parts, or what is learned from them. Code of a data set is never run.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from hfkd.data.messages import clean, completion_text, has_messages, is_answered
from hfkd.data.sources import DataError, near, read
from hfkd.named import import_function

logger = logging.getLogger(__name__)

CANONICAL = (
    *("prompt", "completion", "messages", "privileged_context", "demonstrations", "answer"),
    *("token_weights", "teacher", "domain", "verification", "score"),
)
"""The columns that a row may have; any other column of a file is left behind."""

_TEXTS = ("prompt", "completion", "answer", "privileged_context", "teacher", "domain")


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
        path: A .json, .jsonl, .csv, .parquet or .yaml file, a folder of such files, a data set of the hub by its id,
            or `reasoning_gym:<task>` (several tasks, as many rows of each: `reasoning_gym:<task>,<task>`).
        name: Configuration of a hub data set.
        split: Split of a folder or a hub data set; slices such as `train[:100]` work. A single file is one split, so
            any name stands for all of it.
        format: A name of `hfkd.data.formats.FORMATS` or `package.module:function`; turns a row of the source into one
            with the known columns.
        columns: Known column -> column of the source (after `format`).
        size: Take so many rows, chosen by `seed`; all where there are fewer. For reasoning-gym, how many are made.
        seed: Of the choice, and of what reasoning-gym makes.
        revision: Commit, tag or branch of a hub data set.
        options: The task's configuration for reasoning-gym; else keyword arguments of `datasets.load_dataset`.
    """

    path: str
    name: str | None = None
    split: str = "train"
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    size: int | None = None
    seed: int = 0
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def load_rows(source: Source, *, require_completion: bool = True) -> Dataset:
    """Load rows and bring them to the known columns.

    Args:
        source: Where they come from.
        require_completion: Whether each row must have an answer; without it, rows of prompts alone will do, for a
            teacher that writes the answers.

    Returns:
        A data set with `prompt` and `completion`, or `messages`, and where given `privileged_context`,
        `demonstrations`, `answer`, `token_weights`, `teacher`, `domain`, `verification` and `score`; `answer` is the
        stripped completion where there is none.

    Raises:
        ValueError: The file, split, task, format or a column doesn't exist, a value is empty or of the wrong kind, or
            there are no rows at all.
    """
    source = Source(**{**vars(source), "path": str(source.path)})
    if source.size is not None and source.size < 1:
        raise DataError(f"{source.path}: size is {source.size}; expected at least 1, or none for all rows")
    form = _format(source.format) if source.format else None
    table = read(source)
    if len(table) == 0:
        raise DataError(f"{source.path} is an empty data set (split {source.split!r}); expected at least one row")
    numbers = _chosen(source, len(table))
    if form is None:
        _check_columns(source, list(table[0]), require_completion)
    rows = [_row(source, form, number, table[number], require_completion) for number in numbers]
    names = [name for name in CANONICAL if any(row.get(name) is not None for row in rows)]
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def _chosen(source: Source, count: int) -> Sequence[int]:
    if source.size is None or source.size == count:
        return range(count)
    if source.size > count:
        logger.warning("%s has %d rows, fewer than the %d asked for; all are taken.", source.path, count, source.size)
        return range(count)
    return sorted(random.Random(source.seed).sample(range(count), source.size))


def _row(
    source: Source, form: Callable[[dict], Mapping] | None, number: int, raw: dict, require_completion: bool
) -> dict[str, Any]:
    """One row in the known columns, checked; errors name its number, counted from 0."""
    try:
        shaped = raw if form is None else form(raw)
        if not isinstance(shaped, Mapping):
            raise ValueError(f"the format {source.format!r} returned {shaped!r}; expected a dictionary of columns")
        if form is not None:
            _check_columns(source, list(shaped), require_completion)
        row = _mapped(shaped, source.columns)
        _check_row(row, require_completion)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source.path}, row {number}: {_words(error)}") from error
    answered = is_answered(row) if has_messages(row) else row.get("completion") is not None
    if row.get("answer") is None and answered:
        row["answer"] = completion_text(row)
    return row


def _mapped(shaped: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    row = {name: shaped.get(columns.get(name, name)) for name in CANONICAL}
    for name in _TEXTS:
        if isinstance(row[name], int | float) and not isinstance(row[name], bool):
            row[name] = str(row[name])  # a column of numbers in a CSV file
    row["demonstrations"] = row["demonstrations"] or None
    return row


def _check_columns(source: Source, found: Sequence[str], require_completion: bool) -> None:
    """Refuse a mapping of unknown or absent columns, and rows without what is needed."""
    where = f"{source.path} (columns {', '.join(found) or 'none'})"
    for name, column in source.columns.items():
        if name not in CANONICAL:
            raise DataError(f"columns maps {name!r}; known columns are {', '.join(CANONICAL)}{near(name, CANONICAL)}")
        if column not in found:
            raise DataError(f"{where}: columns maps {name!r} to {column!r}, which isn't there{near(column, found)}")
    having = {name for name in CANONICAL if source.columns.get(name, name) in found}
    if "messages" in having and "prompt" not in having:
        return
    needed = ("prompt", "completion") if require_completion else ("prompt",)
    for name in needed:
        if name not in having:
            raise DataError(
                f"{where} has no column {name!r}; name the column that holds it with "
                f"columns: {{{name}: <column>}}, or choose a format"
            )


def _check_row(row: Mapping[str, Any], require_completion: bool) -> None:
    if has_messages(row):
        _check_messages(row["messages"], require_completion)
    else:
        _check_filled(row, "prompt")
        if require_completion or row["completion"] is not None:
            _check_filled(row, "completion")
            if isinstance(row["prompt"], str) != isinstance(row["completion"], str):
                raise ValueError(
                    "one of prompt and completion is a text, the other a list of messages; give both in one form"
                )
    for name in ("answer", "privileged_context"):
        if row[name] is not None and not isinstance(row[name], str):
            raise ValueError(f"the column {name!r} holds {_short(row[name])}; expected a text")
    for shown in row["demonstrations"] or ():
        if not isinstance(shown, Mapping):
            raise ValueError(
                f"the column 'demonstrations' holds {_short(shown)}; expected a list of rows with prompt and "
                "completion"
            )
        _check_row({name: shown.get(name) for name in CANONICAL} | {"demonstrations": None}, True)


def _check_filled(row: Mapping[str, Any], name: str) -> None:
    value = row[name]
    if value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, list) and not value):
        raise ValueError(f"the column {name!r} is empty; fill it or take the row out")
    if isinstance(value, list):
        clean(value)
    elif not isinstance(value, str):
        raise ValueError(f"the column {name!r} holds {_short(value)}; expected a text or a list of chat messages")


def _check_messages(messages: Any, require_completion: bool) -> None:
    if not isinstance(messages, list) or len(messages) < (2 if require_completion else 1):
        raise ValueError(f"the column 'messages' holds {_short(messages)}; expected at least a question and an answer")
    last = clean(messages)[-1]
    if require_completion and last["role"] != "assistant":
        raise ValueError(
            f"the last of the messages is of the role {last['role']!r}; expected 'assistant', whose turn is learned"
        )


def _format(name: str) -> Callable[[dict], Mapping]:
    if ":" in name:
        try:
            return import_function(name, "the format")
        except ValueError as error:
            raise DataError(str(error)) from error
    from hfkd.data.formats import FORMATS

    if name not in FORMATS:
        raise DataError(
            f"there is no format {name!r}{near(name, FORMATS)}; known are {', '.join(FORMATS)}, or "
            "package.module:function"
        )
    return FORMATS[name]


def _words(error: Exception) -> str:
    return f"the format found no {error} in it" if isinstance(error, KeyError) else str(error)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
