"""Texts that the teacher reads badly count less: token weights by how well it knows the text of the data set.

Knows figures of tokens, no text and no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfkd.distributed import total_over_processes
from hfkd.reading import read_batch
from hfkd.revision.base import Reviser
from hfkd.revision.needs import check_teacher
from hfkd.revision.tokens import weighed
from hfkd.token_figures import TokenFigures

_MEASURES = ("accuracy", "likelihood")


class TeacherQuality(Reviser):
    """Multiplies the weights of a row's tokens by how good the teacher is on the row.

    A teacher that is wrong about a text teaches its faults with the same force as what it knows. The weight counts for
    all terms, those that learn the text itself too, and isn't scaled to a mean of 1: where the teacher is poor less is
    learned. What the student wrote has no gold tokens and is left as it is.

    One more forward of the teacher, and of the student, a micro-batch.

    Args:
        measure: `accuracy`, the share of the text's tokens that the teacher finds likeliest, or `likelihood`, exp of
            the mean log-probability that it gives them; both lie between 0 and 1.
        per: `row`, or `step`: one weight for all rows of a step, by its tokens on all processes.
        floor: The least weight, from 0 to 1.

    Paper:
        Carrino, Escolano and Fonollosa, 2023, https://arxiv.org/abs/2309.17134, who scale the distillation loss of
        extractive question answering by the teacher's mean average precision on the batch. Ours: tokens of a text in
        the place of spans, the likeliest one alone, and rows.

    Raises:
        ValueError: An argument is none of these.
    """

    needs_teacher = True

    def __init__(self, measure: str = "accuracy", per: str = "row", floor: float = 0.0) -> None:
        for name, value, known in (("measure", measure, _MEASURES), ("per", per, ("row", "step"))):
            if value not in known:
                raise ValueError(f"teacher_quality: {name} is {value!r}; expected {known[0]!r} or {known[1]!r}.")
        if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor <= 1:
            raise ValueError(f"teacher_quality: floor is {floor!r}; expected a number from 0 to 1.")
        self.measure, self.per, self.floor = measure, per, float(floor)
        self._figures: dict[str, tuple[float, float]] = {}

    def attach(self, trainer: Any) -> None:
        """Look for a teacher.

        Raises:
            ValueError: There is none.
        """
        super().attach(trainer)
        check_teacher(trainer, "teacher_quality", "it asks how good the teacher is")

    def revise(self, batches: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """Weigh the tokens, unless the student wrote them.

        Raises:
            ValueError: The teacher is a cache that doesn't list a token of the text, and the measure is `likelihood`.
        """
        self._figures = {}
        if any(batch.get("own_text") for batch in batches):
            return list(batches)
        read = [read_batch(self.trainer, batch) for batch in batches]
        scores = [self._scores(each) for each in read]
        sums = [float(sum(score.sum() for score in scores)), float(sum(map(len, scores)))]
        if self.per == "step":
            total, tokens = total_over_processes(sums, self.trainer.args.device).tolist()
            quality = [np.full(len(score), self._quality(total / max(tokens, 1.0))) for score in scores]
        else:
            quality = [self._by_row(each, score) for each, score in zip(read, scores, strict=True)]
        self._figures["teacher/quality"] = float(sum(each.sum() for each in quality)), sums[1]
        return [weighed(batch, np.maximum(each, self.floor)) for batch, each in zip(batches, quality, strict=True)]

    def figures(self) -> dict[str, tuple[float, float]]:
        """Of the last step: `teacher/quality`, the mean over its tokens, before the floor."""
        return dict(self._figures)

    def _scores(self, figures: TokenFigures) -> NDArray[np.float64]:
        """[N] what the mean is taken of: right or wrong, or a log-probability (nats)."""
        if self.measure == "accuracy":
            return (figures.teacher.top == figures.target).astype(float)
        if np.isnan(figures.teacher.log_prob).any():
            raise ValueError(
                "teacher_quality: measure is 'likelihood', and the teacher's rows don't list every token of the text, "
                "so its probability isn't known. Set measure to 'accuracy', or build the cache with the codec hidden."
            )
        return figures.teacher.log_prob.astype(float)

    def _quality(self, mean: NDArray[np.float64] | float) -> NDArray[np.float64] | float:
        return np.exp(mean) if self.measure == "likelihood" else mean

    def _by_row(self, figures: TokenFigures, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N] the quality of each token's row."""
        sums, counts = (np.bincount(figures.text, weights=weights) for weights in (scores, None))
        return self._quality(sums / np.maximum(counts, 1))[figures.text]
