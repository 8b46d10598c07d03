"""Whether a model is right as often as it is sure."""

from __future__ import annotations

from typing import Any

import evaluate

from hfkd.eval.metrics import inputs
from hfkd.measures import BINS, brier_score, calibration_error, reliability

_CITATION = "Guo et al., 2017, https://arxiv.org/abs/1706.04599; Brier, 1950."
_INPUTS = """
Args:
    predictions: [n, V] log-probabilities (nats) or logits of a model.
    references: [n] the ids that the text has.
    bins: Of equal width in the probability of the likeliest token.

Returns:
    `expected_calibration_error` (share), `brier` (sum over the vocabulary of squared differences to certainty, 0 to
    2), `accuracy`, `tokens`, and for each bin that isn't empty in `reliability` its `low`, `high`, `tokens`,
    `confidence` and `accuracy`.
"""


class Calibration(inputs.CheckedMetric):
    """Expected calibration error of the likeliest token, and the Brier score of the whole distribution."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(self.__doc__, _INPUTS, _CITATION, predictions=inputs.ROWS, references="int64")

    def _compute(self, predictions: Any, references: Any, bins: int = BINS) -> dict[str, Any]:
        if bins < 1:
            raise ValueError(f"bins is {bins}; expected at least 1.")
        rows = inputs.log_probs_of(predictions, "predictions")
        targets = inputs.ids_of(references, "references", len(rows), rows.shape[1])
        right = rows.argmax(dim=-1) == targets
        found = reliability(rows.amax(dim=-1).exp().numpy(), right.numpy(), bins)
        return {
            "expected_calibration_error": calibration_error(found),
            "brier": float(brier_score(rows, targets).double().mean()),
            "accuracy": float(right.double().mean()),
            "tokens": len(rows),
            "reliability": found,
        }
