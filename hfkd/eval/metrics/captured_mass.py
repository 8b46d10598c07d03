"""How much of the student's mass lies on what the teacher finds likeliest."""

from __future__ import annotations

from typing import Any

import evaluate

from hfkd.eval.metrics import inputs
from hfkd.measures import mass_on

_INPUTS = """
Args:
    predictions: [n, V] log-probabilities (nats) or logits of the student.
    references: [n, V] those of the teacher.
    k: How many of the teacher's likeliest ids of each token; 64 where nothing is said, or all where there are fewer.

Returns:
    `student` and `teacher`: the mean mass (0 to 1) that each puts on these ids; `k`, `tokens`.
"""


class CapturedMass(inputs.CheckedMetric):
    """Mass on the teacher's k likeliest tokens."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(self.__doc__, _INPUTS, predictions=inputs.ROWS, references=inputs.ROWS)

    def _compute(self, predictions: Any, references: Any, k: int | None = None) -> dict[str, Any]:
        chunk = inputs.chunk_of(predictions, references)
        if k is not None and not 1 <= k <= chunk.vocab_size:
            raise ValueError(f"k is {k}, and the rows have {chunk.vocab_size} entries; expected 1 to that.")
        count = min(64, chunk.vocab_size) if k is None else k
        ids = chunk.top_ids(count)
        student, teacher = (mass_on(rows, ids).double().mean() for rows in chunk.log_probs())
        return {"k": count, "student": float(student), "teacher": float(teacher), "tokens": len(chunk)}
