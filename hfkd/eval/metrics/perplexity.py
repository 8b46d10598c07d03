"""How surprising a text is to a model."""

from __future__ import annotations

from typing import Any

import evaluate

from hfkd.eval.metrics import inputs
from hfkd.measures import perplexity
from hfkd.rows import LOWEST

_INPUTS = """
Args:
    predictions: [n] the model's log-probability (nats) of each token of the text, of all texts one after the other:
        the mean is taken over tokens, not over texts. A probability of 0 counts as exp(-1e4).

Returns:
    `perplexity`, exp of minus their mean; `surprise`, that mean without its sign (nats a token); `tokens`.
"""


class Perplexity(inputs.CheckedMetric):
    """exp of the mean negative log-probability of the text's tokens."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(self.__doc__, _INPUTS, predictions="float64")

    def _compute(self, predictions: Any) -> dict[str, Any]:
        values = inputs.numbers_of(predictions, "predictions", lowest=LOWEST)
        if not (values <= 1e-6).all():
            raise ValueError(
                f"predictions go up to {values.max()}; expected log-probabilities, which are at most 0: neither "
                "probabilities nor losses."
            )
        return {"perplexity": perplexity(values), "surprise": -float(values.mean()), "tokens": len(values)}
