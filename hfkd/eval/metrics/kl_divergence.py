"""How far the student's distribution over the next token is from the teacher's, in both directions."""

from __future__ import annotations

from typing import Any

import evaluate

from hfkd.eval.metrics import inputs
from hfkd.measures import divergence

_INPUTS = """
Args:
    predictions: [n, V] log-probabilities (nats) or logits of the student. A probability of 0 counts as exp(-1e4), so
        that the figures stay finite.
    references: [n, V] those of the teacher.

Returns:
    `forward_kl`, KL(teacher || student), and `reverse_kl`, KL(student || teacher), both in nats a token; `tokens`.
"""


class KLDivergence(inputs.CheckedMetric):
    """Mean forward and reverse Kullback-Leibler divergence over tokens, 0 where both are the same."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(self.__doc__, _INPUTS, predictions=inputs.ROWS, references=inputs.ROWS)

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        student, teacher = inputs.chunk_of(predictions, references).log_probs()
        return {
            "forward_kl": float(divergence(teacher, student).double().mean()),
            "reverse_kl": float(divergence(student, teacher).double().mean()),
            "tokens": len(student),
        }
