"""Rows to other rows, with the models at hand, before training: what a transform is.

A transform runs once, after the teacher wrote the answers (where it does) and before views are made. Knows rows,
models and prompts; it trains nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hfkd.data.prompts import PromptBuilder
from hfkd.rollout.base import Rollout
from hfkd.teachers import Teacher

Row = dict[str, Any]


@dataclass
class Workshop:
    """What a transform may work with.

    Attributes:
        student: The student, before training, on its device; None where no transform asked for models.
        teacher: Prepared; None where the recipe has none.
        builder: Writes and tokenizes prompts and answers; `builder.tokenizer` is the student's tokenizer.
        demonstrations: What the teacher's prompt shows.
        held_out: Rows that training must not see (the evaluation's), as a clean set to measure on.
        rollout: Lets a model write.
        seed: Of the run's data.
        folder: Of the run, for what is dear to make again; None keeps nothing.
        say: Prints a line for the user, on the first process.
    """

    student: nn.Module | None
    teacher: Teacher | None
    builder: PromptBuilder
    demonstrations: Sequence[Row] = ()
    held_out: Sequence[Row] = ()
    rollout: Rollout | None = None
    seed: int = 0
    folder: Path | None = None
    say: Callable[[str], None] = field(default=lambda text: None)


class RowTransform(ABC):
    """Makes training rows out of training rows. `apply` is the method to write.

    Attributes:
        needs_teacher: Whether a recipe without a teacher is refused.
        writes: Columns that it gives its rows; `token_weights` among them is read by the training without being asked
            for.
    """

    needs_teacher: bool = False
    writes: tuple[str, ...] = ()

    def check(self, rows: Sequence[Row]) -> None:
        """Look at the rows before any model is asked; the first transform of a recipe is called so.

        Args:
            rows: As they were loaded: answers that the teacher is to write aren't there yet.

        Raises:
            ValueError: They can't be transformed.
        """
        return None

    @abstractmethod
    def apply(self, rows: Sequence[Row], workshop: Workshop) -> list[Row]:
        """Return the rows that are trained on; the given ones stay as they are. All processes call it at once and
        return the same.

        Args:
            rows: With `prompt` and `completion`, or `messages`, and any other columns.
            workshop: Models, prompts, and what else is there.

        Raises:
            ValueError: The rows can't be transformed, or none would be left.
        """

    def describe(self) -> dict[str, Any]:
        """What the last `apply` did, as plain data for the run record (numbers of rows kept, dropped, made)."""
        return {}
