"""A share of the training rows: drawn by chance, or the highest or lowest by a number that each row has.

Knows rows; it asks no model. What fewer rows want of the teacher's weight is said in `hfkd.schedules.kept_weight`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from hfkd.named import import_function
from hfkd.transforms.base import Row, RowTransform, Workshop

RANDOM = "random"
TAKES = ("highest", "lowest")


class PruneRows(RowTransform):
    """Keeps a share of the rows, in the order of the data.

    A row's place in the draw depends on the seed and on its number alone: of two shares, the rows of the smaller one
    are among those of the larger one. Where two rows have the same number in the column, chance decides between them.

    Args:
        keep: The share of the rows that is kept, above 0 and at most 1; at least one row is.
        by: `random`, the name of a column that holds one number for each row, or `package.module:function`, a function
            of a row that returns a number.
        take: `highest` or `lowest`: the end that is kept; of no use with `random`.

    Raises:
        ValueError: The share isn't one, `take` is neither, or the function can't be imported.

    Paper:
        Ben-Baruch, Botach, Kviatkovsky, Aggarwal and Medioni, 2024, https://arxiv.org/abs/2403.07854: with a teacher,
        rows drawn by chance do as well as rows that were chosen, and the teacher's weight should rise as rows become
        fewer (`{schedule: kept}` as the weight of a term). The paper prunes images; scores of images aren't here.
    """

    def __init__(self, keep: float, by: str = RANDOM, take: str = "highest") -> None:
        if isinstance(keep, bool) or not isinstance(keep, Real) or not 0 < keep <= 1:
            raise ValueError(f"keep is {keep!r}; expected the share of the rows that is kept, above 0 and at most 1.")
        if not isinstance(by, str) or not by:
            raise ValueError(f"by is {by!r}; expected random, a column, or package.module:function.")
        if take not in TAKES:
            raise ValueError(f"take is {take!r}; expected one of {', '.join(TAKES)}.")
        self.keep, self.by, self.take = float(keep), by, take
        self._score: Callable[[Row], Any] | None = import_function(by, "by") if ":" in by else None
        self._told: dict[str, Any] = {}

    def check(self, rows: Sequence[Row]) -> None:
        """Each row needs a number in the column; what a function says of it is asked later, when answers are there."""
        if self.by != RANDOM and self._score is None:
            self._numbers(rows)

    def apply(self, rows: Sequence[Row], workshop: Workshop) -> list[Row]:
        """Choose by the run's seed.

        Raises:
            ValueError: A row has no number in the column.
        """
        order = list(range(len(rows)))
        random.Random(f"{workshop.seed}/prune").shuffle(order)  # a string seed is the same on every machine
        if self.by != RANDOM:
            order.sort(
                key=self._numbers(rows).__getitem__, reverse=self.take == "highest"
            )  # stable: chance stays between equals
        chosen = sorted(order[: max(1, round(self.keep * len(rows)))])
        self._told = {"rows": len(rows), "kept": len(chosen), "by": self.by}
        return [rows[place] for place in chosen]

    def describe(self) -> dict[str, Any]:
        """How many of how many rows were kept, and by what."""
        return dict(self._told)

    def _numbers(self, rows: Sequence[Row]) -> list[float]:
        return [self._number(place, row) for place, row in enumerate(rows)]

    def _number(self, place: int, row: Mapping[str, Any]) -> float:
        found = self._score(row) if self._score is not None else row.get(self.by)
        if isinstance(found, bool) or not isinstance(found, Real) or not math.isfinite(found):
            having = sorted(name for name, value in row.items() if isinstance(value, Real))
            raise ValueError(
                f"prune: row {place} has {found!r} as {self.by!r}; expected a finite number. Columns with a number: "
                f"{', '.join(having) or 'none'}. Give each row one, or prune by random."
            )
        return float(found)
