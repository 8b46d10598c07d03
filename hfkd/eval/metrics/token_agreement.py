"""How often student and teacher find the same next token likeliest."""

from __future__ import annotations

from typing import Any

import evaluate

from hfkd.eval.metrics import inputs
from hfkd.measures import agreement, chance_agreement

_INPUTS = """
Args:
    predictions: [n] the ids that the student finds likeliest.
    references: [n] the ids that the teacher finds likeliest.
    gold: [n] the ids that the text has; optional.

Returns:
    `agreement` (share), `chance` (the share expected if the teacher's ids were dealt out at random), `tokens`; with
    gold also `student_accuracy`, `teacher_accuracy`, `teacher_wrong` (tokens) and `agreement_when_teacher_wrong`
    (share of those, None where there are none).
"""


class TokenAgreement(inputs.CheckedMetric):
    """Top-1 agreement on the same text, and where the teacher is wrong about it."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(self.__doc__, _INPUTS, predictions="int64", references="int64")

    def _compute(self, predictions: Any, references: Any, gold: Any = None) -> dict[str, Any]:
        inputs.require(predictions, "predictions")
        student, teacher = (
            inputs.ids_of(ids, name, len(predictions)).numpy()
            for ids, name in ((predictions, "predictions"), (references, "references"))
        )
        figures = {"tokens": len(student), "chance": chance_agreement(student, teacher)}
        if gold is None:
            return agreement(student == teacher) | figures
        gold = inputs.ids_of(gold, "gold", len(student)).numpy()
        accuracies = {
            "student_accuracy": float((student == gold).mean()),
            "teacher_accuracy": float((teacher == gold).mean()),
        }
        return agreement(student == teacher, teacher == gold) | figures | accuracies
