"""What a task lost in training that was for another one."""

from __future__ import annotations

from typing import Any

import evaluate

from hfkd.eval.metrics import inputs
from hfkd.measures import RESAMPLES, forgetting

_INPUTS = """
Args:
    predictions: [n] each item's score after training: 1 or 0 for right or wrong, or any number.
    references: [n] the score of the same item before.
    resamples: Draws of the bootstrap over items.
    seed: Of the draws.

Returns:
    The means `before` and `after`, `change` and its 95 % `change_interval` (paired bootstrap; None of fewer than ten
    items, and where all moved alike), and of `items` how many fell (`lost`) and rose (`gained`).
"""


class Forgetting(inputs.CheckedMetric):
    """The paired change of a held-out task's score."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(self.__doc__, _INPUTS, predictions="float64", references="float64")

    def _compute(self, predictions: Any, references: Any, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
        after, before = inputs.numbers_of(predictions, "predictions"), inputs.numbers_of(references, "references")
        return forgetting(after, before, resamples=resamples, seed=seed)
