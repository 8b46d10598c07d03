"""Raw rows from files, folders, the hub and reasoning-gym; what their columns mean is the business of `load`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import yaml

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_YAML = (".yaml", ".yml")
SUFFIXES = (*_BUILDERS, *_YAML)
_GYM = "reasoning_gym:"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class DataError(ValueError):
    """Rows can't be had or aren't what training needs; the message says what to change."""


class RawSource(Protocol):
    """What of `hfkd.data.load.Source` is needed here."""

    path: str
    name: str | None
    split: str
    size: int | None
    seed: int
    revision: str | None
    options: dict[str, Any]


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the nearest names, or nothing when none is near."""
    found = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def read(source: RawSource) -> Sequence[dict[str, Any]]:
    """All rows of a source, as it stores them.

    Raises:
        DataError: It doesn't exist or can't be read.
    """
    path = source.path
    if "trust_remote_code" in source.options:
        raise DataError(f"{path}: options holds trust_remote_code; code of a data set is never run here")
    if path.startswith(_GYM):
        return _gym(path.removeprefix(_GYM), source)
    suffix = Path(path.partition("?")[0]).suffix.lower()
    local = Path(path).expanduser()
    if "://" in path:
        return _file(path, suffix, source)
    if local.is_dir():
        return _load(str(local), source, name=source.name, split=source.split)
    if local.exists():
        return _file(str(local), suffix, source)
    if suffix in SUFFIXES or path.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(path):
        raise DataError(f"there is no file {path}{_beside(local)}")
    return _load(path, source, name=source.name, split=source.split, revision=source.revision)


def _beside(path: Path) -> str:
    """The nearest names in the folder where a file was looked for."""
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent} either"
    others = [each.name for each in path.parent.iterdir() if each.suffix.lower() in SUFFIXES]
    alike = difflib.get_close_matches(path.stem, [Path(other).stem for other in others], n=3)
    if alike:
        return f"; did you mean {' or '.join(other for other in others if Path(other).stem in alike)}?"
    return f"; data files beside it: {', '.join(sorted(others)[:8])}" if others else ""


def _file(path: str, suffix: str, source: RawSource) -> Sequence[dict[str, Any]]:
    if suffix in _YAML and "://" not in path:
        return _yaml(path)
    if suffix not in _BUILDERS:
        raise DataError(f"{path} ends in {suffix or 'nothing'!r}; expected one of {', '.join(SUFFIXES)}")
    if "://" not in path and Path(path).stat().st_size == 0:
        raise DataError(f"{path} is an empty data set (the file has no byte); expected at least one row")
    split = source.split.partition("[")[0]
    return _load(_BUILDERS[suffix], source, data_files={split: path}, split=source.split)


def _yaml(path: str) -> list[dict[str, Any]]:
    try:
        rows = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{path} holds {type(rows).__name__} at the top; expected a list of rows, each `- prompt: ...`"
        )
    return rows


def _load(what: str, source: RawSource, **arguments: Any) -> datasets.Dataset:
    """`datasets.load_dataset`, with its many kinds of errors turned into one that names the source."""
    if what == "csv":
        # else pandas reads the words "NA", "null" and "None" as nothing
        arguments["keep_default_na"] = False
    given = {key: value for key, value in arguments.items() if value is not None} | source.options
    try:
        return datasets.load_dataset(what, **given)
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError, StopIteration) as error:
        raise DataError(f"{source.path}: {_reason(error)}{_way_out(error, source)}") from error


def _reason(error: BaseException) -> str:
    if "corresponds to no data" in str(error) or isinstance(error, StopIteration):
        return "this is an empty data set; expected at least one row"
    words = [" ".join(str(each).split()) for each in (error, error.__cause__) if each is not None and str(each)]
    return ": ".join(words) or f"it can't be read ({type(error).__name__})"


def _way_out(error: BaseException, source: RawSource) -> str:
    if isinstance(error, datasets.exceptions.DatasetGenerationError):
        return "; a file of it is probably damaged or truncated"
    if isinstance(error, ConnectionError | FileNotFoundError):
        return (
            f"; there is no local file or folder {source.path} either, so check the path, the hub id and the network"
        )
    if "BuilderConfig" in str(error) or "Config name" in str(error):
        return "; choose one with `name`"
    return ""


def _gym(names: str, source: RawSource) -> list[dict[str, Any]]:
    """Different questions of a reasoning-gym task, the same ones for the same seed, size and options; of several tasks
    (`a,b,c`) as many of each, with the task as their `domain`, and with options by the task's name.
    """
    tasks = names.split(",")
    if len(tasks) == 1:
        return _gym_task(names, source.size or 500, source.options, source)
    if unknown := [name for name in source.options if name not in tasks]:
        raise DataError(
            f"{source.path} has options for {unknown[0]!r}; with several tasks expected {{<task>: {{<option>: "
            f"<value>}}}}{near(unknown[0], tasks)}"
        )
    if len(set(tasks)) < len(tasks):
        raise DataError(f"{source.path} names a task twice, whose questions would come twice; name each once")
    size, more = divmod(source.size or 500, len(tasks))
    if size == 0:
        raise DataError(
            f"{source.path} names {len(tasks)} tasks, and size is {source.size}; expected at least one each"
        )
    rows = []
    for place, task in enumerate(tasks):
        found = _gym_task(task, size + (place < more), source.options.get(task) or {}, source)
        rows += [{**row, "domain": task} for row in found]
    return rows


def _gym_task(task: str, size: int, options: dict[str, Any], source: RawSource) -> list[dict[str, Any]]:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise DataError(
            f"{source.path} needs the package reasoning-gym ({error}); install it with: pip install reasoning-gym"
        ) from error
    if task not in DATASETS:
        raise DataError(f"reasoning-gym has no task {task!r}{near(task, DATASETS) or _some(DATASETS)}")
    known = [each.name for each in dataclasses.fields(DATASETS[task][1]) if each.name not in ("seed", "size")]
    for option in options:
        if option not in known:
            more = "; set size and seed beside options" if option in ("seed", "size") else near(option, known)
            raise DataError(f"{source.path} has no option {option!r}{more}; it has {', '.join(known) or 'none'}")
    try:
        # some tasks repeat themselves, so more are made than are wanted
        made = create_dataset(task, seed=source.seed, size=4 * size, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise DataError(f"{source.path}: the options {options} are refused: {error}") from error
    return _unique(made, size, source.path)


def _some(names: Iterable[str]) -> str:
    return f"; it has {', '.join(sorted(names)[:8])}, ..."


def _can_be_kept(made: Any) -> bool:
    """Whether the task's own checker still knows its answer as right, once what it reads was written as JSON."""
    item = made[0]
    if item["answer"] is None or not hasattr(made, "score_answer"):
        return False
    try:
        kept = {**item, "metadata": json.loads(json.dumps(item.get("metadata"), default=str))}
        return made.score_answer(item["answer"], kept) == made.score_answer(item["answer"], item)
    except Exception:  # whatever a checker does with what it doesn't expect
        return False


def _unique(made: Any, size: int, path: str) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    keeps = _can_be_kept(made)
    for index in range(len(made)):
        item = made[index]
        if item["answer"] is None:
            raise DataError(
                f"{path} gives no answer to {item['question'][:60]!r}; such a task can't be learned from answers"
            )
        rows.setdefault(
            " ".join(item["question"].casefold().split()),
            {
                "prompt": item["question"],
                "completion": str(item["answer"]),
                "answer": str(item["answer"]),
                "verification": json.dumps(item.get("metadata"), default=str) if keeps else None,
            },
        )
        if len(rows) == size:
            return list(rows.values())
    raise DataError(
        f"{path} gives only {len(rows)} different questions in {len(made)}; lower size, which is {size}, or widen "
        "the options"
    )
