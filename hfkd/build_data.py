"""Rows of a recipe: loaded, split, and refused where they overlap, before any model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkd.data.load import Source, load_rows
from hfkd.data.select import check_leakage, split_rows, visited
from hfkd.recipe import DemonstrationsSection, ForgettingSection, Recipe

if TYPE_CHECKING:
    from hfkd.build import Run

logger = logging.getLogger(__name__)


@dataclass
class Task:
    """A set of items to ask, and the demonstrations to ask them with."""

    name: str
    items: list[dict[str, Any]]
    demonstrations: list[dict[str, Any]]
    shots: list[int]
    extract: str


def load_data(run: Run) -> None:
    """Load all rows, split them and refuse what overlaps; runs before any model is loaded.

    Raises:
        ValueError: Too few rows, a missing column, demonstrations among the evaluation items, or a self-teacher for
            which no row holds a second prompt.
    """
    recipe, data = run.recipe, run.recipe.data
    rows = list(load_rows(run.sources["train"]))
    own_file = "demonstrations" in run.sources
    drawn = _drawn_demonstrations(recipe)
    held_out = recipe.evaluation.size if recipe.evaluation is not None and recipe.evaluation.path is None else 0
    splits = split_rows(rows, demonstrations=drawn, evaluation=held_out, seed=data.demonstrations.seed)
    run.train, run.demonstrations = list(splits.train), list(splits.demonstrations)
    if own_file:
        run.demonstrations = _from_file(run.sources["demonstrations"], data.demonstrations)
    _check_second_view(run)
    if recipe.evaluation is None:
        return
    items = list(splits.evaluation) if "evaluation" not in run.sources else list(load_rows(run.sources["evaluation"]))
    _check_overlap(run.demonstrations, items, run.train)
    evaluation = recipe.evaluation
    run.evaluation = Task(data.train.path, items, run.demonstrations, evaluation.shots, evaluation.extract)
    run.forgetting = [_other_task(run, index, other) for index, other in enumerate(evaluation.forgetting)]


def _drawn_demonstrations(recipe: Recipe) -> int:
    """How many rows leave the training set to be demonstrations; with a column, those that the evaluation shows."""
    demonstrations = recipe.data.demonstrations
    if demonstrations.path is not None:
        return 0
    if demonstrations.column is None:
        return demonstrations.count
    return max(recipe.evaluation.shots) if recipe.evaluation is not None else 0


def _from_file(source: Source, wanted: DemonstrationsSection) -> list[dict[str, Any]]:
    rows = list(load_rows(source))
    if len(rows) < wanted.count:
        raise ValueError(f"data.demonstrations: {source.path} has {len(rows)} rows; expected at least {wanted.count}")
    return visited(rows, wanted.count, wanted.seed)


def _check_second_view(run: Run) -> None:
    recipe = run.recipe
    if recipe.teacher.kind != "self" or recipe.data.prompt.builder is not None or recipe.data.demonstrations.count:
        return
    if not any(row.get("privileged_context") for row in run.train):
        raise ValueError(
            f"teacher.kind: self needs a second prompt, and there is none: data.demonstrations.count is 0 and "
            f"no row of "
            f"{recipe.data.train.path} has a privileged_context; set data.demonstrations.count, or map a column "
            f"to privileged_context"
        )


def _check_overlap(demonstrations: Sequence[Mapping], items: Sequence[Mapping], train: Sequence[Mapping]) -> None:
    """Refuse demonstrations among the items, and say how many training rows an evaluation from elsewhere repeats."""
    check_leakage(demonstrations, items)
    asked = {str(item.get("prompt", item.get("messages"))) for item in items}
    shared = sum(str(row.get("prompt", row.get("messages"))) in asked for row in train)
    if shared:
        logger.warning(
            "%d training rows have the prompt of an evaluation item; the accuracies say less for that.", shared
        )


def _other_task(run: Run, index: int, other: ForgettingSection) -> Task:
    source = run.sources[f"forgetting.{index}"]
    rows = list(load_rows(source))
    splits = split_rows(rows, demonstrations=other.demonstrations, evaluation=0, seed=other.seed)
    shots = [count for count in run.recipe.evaluation.shots if count <= other.demonstrations]
    name = Path(source.path).stem if Path(source.path).suffix else source.path
    extract = other.extract or run.recipe.evaluation.extract
    return Task(name, splits.train[: other.size], splits.demonstrations, shots, extract)
