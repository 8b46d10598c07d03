"""Tasks of EleutherAI's lm-evaluation-harness (`lm_eval`), asked through its Python API.

The package comes with the extra `eval`; it is imported when a task is asked for. Which model is asked, and where it is
from, is the caller's business.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

PREFIX = "lm_eval."
"""What the names of these tasks begin with where they stand beside others."""
_STDERR = "_stderr"


@dataclass(frozen=True)
class HarnessSettings:
    """What is asked, and how much of it.

    Attributes:
        tasks: Names of tasks, groups or tags.
        limit: The first so many documents of each task; None takes all.
        shots: Demonstrations; None takes what each task says.
        include: A folder with tasks of the user's own, as YAML.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    include: Path | None = None

    def describe(self, task: str) -> dict[str, Any]:
        """What decides the result of a task besides the model: plain data, with a hash of the folder's files."""
        return {
            "task": task,
            "limit": self.limit,
            "shots": self.shots,
            "include": None if self.include is None else _folder_hash(self.include),
            "lm_eval": importlib.metadata.version("lm_eval"),
        }


def check_harness(settings: HarnessSettings) -> None:
    """Refuse what can't be asked, before a model is loaded.

    Raises:
        ValueError: lm_eval isn't installed, a number is wrong, the folder isn't there, or a task has no such name.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--lm-eval needs lm_eval, which is not installed; install it with pip install 'hfkd[eval]'")
    if not settings.tasks:
        raise ValueError(
            "--lm-eval names no task; expected names with commas between them, such as hellaswag,arc_easy"
        )
    if settings.limit is not None and settings.limit < 1:
        raise ValueError(f"--lm-eval-limit is {settings.limit}; expected at least 1")
    if settings.shots is not None and settings.shots < 0:
        raise ValueError(f"--lm-eval-shots is {settings.shots}; expected 0 or more")
    if settings.include is not None and not settings.include.is_dir():
        raise ValueError(f"--lm-eval-include: {settings.include} is no folder; expected one with tasks as YAML")
    known = _manager(settings).all_tasks
    for task in settings.tasks:
        if task not in known:
            raise ValueError(f"--lm-eval: lm_eval has no task {task!r}{_near(task, known)}")


def run_harness(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    settings: HarnessSettings,
    *,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Ask a model a task, or a group of them.

    Args:
        model: A causal LM, with or without an adapter; it stays as it is.
        tokenizer: Of the model.
        task: One of `settings.tasks`, looked at by `check_harness`.
        settings: How it is asked.
        batch_size: Texts that are run together.

    Returns:
        `tasks`: by name (a group's own and those of its tasks) `figures` (`metric` or `metric,filter` to `value` and
        `standard_error`, which is null where the harness has none), `documents`, `shots` and `version`; and `scores`:
        by task and metric, each document's hash with its score, where that is a number.

    Raises:
        ValueError: The harness refused; with its reason.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        try:
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
            found = simple_evaluate(
                model=wrapped,
                tasks=[task],
                limit=settings.limit,
                num_fewshot=settings.shots,
                task_manager=_manager(settings),
                log_samples=True,
                batch_size=batch_size,
            )
        except (KeyError, TypeError, AssertionError) as error:
            raise ValueError(f"--lm-eval: {task} can't be asked: {error}") from error
    return {"tasks": _figures(found), "scores": _scores(found.get("samples") or {})}


def _manager(settings: HarnessSettings) -> Any:
    """lm_eval's index of tasks; that of the user's folder alone where it has all that is asked, since the whole takes
    seconds.
    """
    if settings.include is not None:
        own = _index(str(settings.include), False)
        if set(settings.tasks) <= set(own.all_subtasks):
            return own
    return _index(None if settings.include is None else str(settings.include), True)


@cache
def _index(include: str | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include, include_defaults=defaults)


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    counts, shots, versions = (found.get(name) or {} for name in ("n-samples", "n-shot", "versions"))
    tasks = {}
    for name, values in found["results"].items():
        figures = {}
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith(_STDERR) or not _is_number(value):
                continue
            error = values.get(f"{metric}{_STDERR},{filtered}")
            label = metric if filtered == "none" else key
            figures[label] = {"value": float(value), "standard_error": float(error) if _is_number(error) else None}
        documents = (counts.get(name) or {}).get("effective")
        tasks[name] = {"figures": figures, "documents": documents, "shots": shots.get(name)}
        tasks[name]["version"] = versions.get(name)
    return tasks


def _scores(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, list[list[Any]]]]:
    scores: dict[str, dict[str, list[list[Any]]]] = {}
    for task, documents in samples.items():
        for document in documents:
            for metric in document["metrics"]:
                value, filtered = document.get(metric), document.get("filter", "none")
                if _is_number(value):
                    label = metric if filtered == "none" else f"{metric},{filtered}"
                    scores.setdefault(task, {}).setdefault(label, []).append([document["doc_hash"][:16], float(value)])
    return scores


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _near(task: str, known: Sequence[str]) -> str:
    import difflib

    found = difflib.get_close_matches(task, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(found)}?" if found else "; `lm_eval ls tasks` lists them"


def _folder_hash(folder: Path) -> str:
    """Of the names and the bytes of all files below a folder: tasks, their code and data that lie beside them."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\0".encode())
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notices that every use of the API brings."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
