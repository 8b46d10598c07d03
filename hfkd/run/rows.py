"""Rows of a recipe: loaded, split, and refused where they overlap, before any model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfkd.data.load import Source, load_rows
from hfkd.data.messages import Row, prompt_key, text_key
from hfkd.data.select import LeakageError, check_leakage, split_rows, visited
from hfkd.masking import shareable
from hfkd.recipe.schema import DemonstrationsSection, EvaluationSection, ForgettingSection, Recipe
from hfkd.recipe.teachers import may_do_without, wants_second_view

logger = logging.getLogger(__name__)


@dataclass
class Task:
    """A set of items to ask, and the demonstrations to ask them with."""

    name: str
    items: list[dict[str, Any]]
    demonstrations: list[dict[str, Any]]
    shots: list[int]
    extract: str


@dataclass
class Rows:
    """The rows of a run by what they are for. `train` holds no demonstrations and no held-out items."""

    train: list[dict[str, Any]] = field(default_factory=list)
    demonstrations: list[dict[str, Any]] = field(default_factory=list)
    evaluation: Task | None = None
    forgetting: list[Task] = field(default_factory=list)


def load_data(recipe: Recipe, sources: Mapping[str, Source]) -> Rows:
    """Load all rows, split them and refuse what overlaps; runs before any model is loaded.

    Args:
        recipe: From `load_recipe`.
        sources: By section: `train`, `demonstrations`, `evaluation`, `forgetting.<i>`.

    Raises:
        ValueError: Too few rows, a missing column, demonstrations among the evaluation items, or a teacher with the
            student's weights for which no row holds a second prompt.
    """
    data, evaluation = recipe.data, recipe.evaluation
    rows = list(load_rows(sources["train"], require_completion=_needs_labels(recipe)))
    held_out = evaluation.size if evaluation is not None and evaluation.path is None else 0
    key = text_key if data.whole_text else prompt_key  # a passage's prompt is its first word
    shown = _drawn_demonstrations(recipe)
    splits = split_rows(rows, demonstrations=shown, evaluation=held_out, seed=data.demonstrations.seed, key=key)
    loaded = Rows(splits.train, splits.demonstrations)
    if "demonstrations" in sources:
        loaded.demonstrations = _from_file(sources["demonstrations"], data.demonstrations)
    _check_second_view(recipe, loaded.train)
    if evaluation is None:
        return loaded
    items = splits.evaluation if "evaluation" not in sources else list(load_rows(sources["evaluation"]))
    check_leakage(loaded.demonstrations, items, key)
    loaded.train = _apart_from(items, loaded.train, key)
    loaded.evaluation = Task(
        shareable(data.train.path), items, loaded.demonstrations, evaluation.shots, evaluation.extract
    )
    loaded.forgetting = [
        _other_task(sources[f"forgetting.{index}"], other, evaluation)
        for index, other in enumerate(evaluation.forgetting)
    ]
    _tell_apart([loaded.evaluation, *loaded.forgetting])
    return loaded


def _tell_apart(tasks: Sequence[Task]) -> None:
    """Number tasks of one name: two splits of a data set, or two files of one name in different folders."""
    taken: set[str] = set()
    for task in tasks:
        plain, number = task.name, 1
        while task.name in taken:
            number += 1
            task.name = f"{plain} ({number})"
        taken.add(task.name)


def _needs_labels(recipe: Recipe) -> bool:
    """Whether the answers of the training file are read: not where the teacher writes them and all else has its
    file.
    """
    data, evaluation = recipe.data, recipe.evaluation
    shown = data.demonstrations.count > 0 and data.demonstrations.path is None
    asked = evaluation is not None and (evaluation.path is None or evaluation.gold_baseline)
    return data.answer == "dataset" or (isinstance(data.answer, dict) and "dataset" in data.shares) or shown or asked


def _drawn_demonstrations(recipe: Recipe) -> int:
    """How many rows leave the training set to be demonstrations; with a column, those that the evaluation shows."""
    demonstrations = recipe.data.demonstrations
    if demonstrations.path is not None:
        return 0
    if demonstrations.column is None:
        return demonstrations.count
    return max(recipe.evaluation.shots, default=0) if recipe.evaluation is not None else 0


def _from_file(source: Source, wanted: DemonstrationsSection) -> list[dict[str, Any]]:
    rows = list(load_rows(source))
    if len(rows) < wanted.count:
        raise ValueError(f"data.demonstrations: {source.path} has {len(rows)} rows; expected at least {wanted.count}")
    return visited(rows, wanted.count, wanted.seed)


def _check_second_view(recipe: Recipe, train: Sequence[Mapping]) -> None:
    data, kind = recipe.data, recipe.teacher.kind
    if not wants_second_view(recipe) or data.prompt.builder is not None or data.demonstrations.count:
        return
    if any(row.get("privileged_context") for row in train):
        return
    why, way_out = f"{kind} needs a second prompt, and there is none", ""
    if may_do_without(recipe.teacher):
        why = f"{kind} begins as the student and reads the same prompt, and no term learns the text"
        way_out = ", or add cross_entropy"
    raise ValueError(
        f"teacher.kind: {why}: data.demonstrations.count is 0 and no row of {data.train.path} has a "
        f"privileged_context; set data.demonstrations.count, or map a column to privileged_context{way_out}"
    )


def _apart_from(
    items: Sequence[Mapping], train: list[dict[str, Any]], key: Callable[[Row], str]
) -> list[dict[str, Any]]:
    """The training rows that ask nothing of what the evaluation asks: held out is held out, whichever file it is
    from.
    """
    asked = {key(item) for item in items}
    apart = [row for row in train if key(row) not in asked]
    if not apart and train:
        raise LeakageError(
            f"all {len(train)} training rows have the prompt of an evaluation item; give evaluation.path another "
            f"file, or "
            "leave it out and have items held out of the training file"
        )
    if len(apart) < len(train):
        logger.warning(
            "%d training rows have the prompt of an evaluation item and are left out.", len(train) - len(apart)
        )
    return apart


def _other_task(source: Source, other: ForgettingSection, evaluation: EvaluationSection) -> Task:
    rows = list(load_rows(source))
    splits = split_rows(rows, demonstrations=other.demonstrations, evaluation=0, seed=other.seed)
    shots = [count for count in evaluation.shots if count <= other.demonstrations]
    name = shareable(Path(source.path).stem if Path(source.path).suffix else source.path)
    extract = other.extract or evaluation.extract
    return Task(name, splits.train[: other.size], splits.demonstrations, shots, extract)
