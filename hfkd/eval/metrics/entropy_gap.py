"""Whether the student is surer or less sure than the teacher."""

from __future__ import annotations

from typing import Any

import evaluate

from hfkd.eval.metrics import inputs
from hfkd.measures import entropy

_INPUTS = """
Args:
    predictions: [n, V] log-probabilities (nats) or logits of the student.
    references: [n, V] those of the teacher.

Returns:
    `student` and `teacher`: their mean entropies (nats); `gap`: the student's minus the teacher's, below 0 where the
    student is surer; `tokens`.
"""


class EntropyGap(inputs.CheckedMetric):
    """The mean entropies over tokens and their difference."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(self.__doc__, _INPUTS, predictions=inputs.ROWS, references=inputs.ROWS)

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        pair = inputs.chunk_of(predictions, references).log_probs()
        student, teacher = (float(entropy(rows).double().mean()) for rows in pair)
        return {"student": student, "teacher": teacher, "gap": student - teacher, "tokens": len(pair[0])}
