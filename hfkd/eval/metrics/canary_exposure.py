"""Whether a model remembers a secret that it was not meant to learn."""

from __future__ import annotations

from typing import Any

import evaluate
import numpy as np

from hfkd.eval.metrics import inputs
from hfkd.measures import exposure

_CITATION = "Carlini et al., 2019, https://arxiv.org/abs/1802.08232."
_INPUTS = """
Args:
    predictions: [R] the model's log-perplexity of each candidate: minus the sum of its tokens' log-probabilities
        (nats).
    references: [R] 1 for a candidate that was inserted into the training set, 0 for the others.

Returns:
    `exposure` (bits), log2 R - log2 rank, the mean where several were inserted; `largest` (bits) and `rank` of the one
    that stands out most; `candidates`, R; `maximum` (bits), log2 R. A model that never saw the canary has about 1 bit.
"""


class CanaryExposure(inputs.CheckedMetric):
    """The rank of an inserted canary among all texts that could have been inserted. Proves a leak, never its
    absence.
    """

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(self.__doc__, _INPUTS, _CITATION, predictions="float64", references="int64")

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        values = inputs.numbers_of(predictions, "predictions")
        marks = np.asarray(references)
        if not np.isin(marks, (0, 1)).all() or not marks.any():
            raise ValueError(
                "references must be 1 for what was inserted and 0 for the other candidates, and at least one was "
                f"inserted; got {marks[:5].tolist()}…"
            )
        return exposure(values, marks)
