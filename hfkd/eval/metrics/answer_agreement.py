"""How often student and teacher give the same answer, right or wrong."""

from __future__ import annotations

from typing import Any

import evaluate

from hfkd.eval.answers import match
from hfkd.eval.metrics import inputs
from hfkd.intervals import wilson_interval
from hfkd.measures import agreement

_CITATION = "After https://arxiv.org/abs/2505.15442."
_INPUTS = """
Args:
    predictions: [n] the student's short answers; an empty one stands for none.
    references: [n] the teacher's.
    gold: [n] the right answers; optional.
    tolerance: For numbers, relative, and absolute below 1.

Returns:
    `agreement` (share) with its 95 % `agreement_interval` (Wilson), `items`, and how often both gave none (these
    agree): `both_unanswered`. With gold also `student_accuracy`, `teacher_accuracy`, `teacher_wrong` (items) and
    `agreement_when_teacher_wrong` (share of those, None where there are none).
"""


class AnswerAgreement(inputs.CheckedMetric):
    """The share of items on which both give the same answer, whatever the right one is, and where the teacher errs."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(self.__doc__, _INPUTS, _CITATION, predictions="string", references="string")

    def _compute(self, predictions: Any, references: Any, gold: Any = None, tolerance: float = 0.0) -> dict[str, Any]:
        inputs.require(predictions, "predictions")
        predictions, references = ([answer or "" for answer in side] for side in (predictions, references))
        pairs = list(zip(predictions, references, strict=True))
        agreed = [match(student, teacher, tolerance) for student, teacher in pairs]
        figures = {
            "agreement_interval": list(wilson_interval(sum(agreed), len(pairs))),
            "items": len(pairs),
            "both_unanswered": sum(not student.strip() and not teacher.strip() for student, teacher in pairs),
        }
        if gold is None:
            return agreement(agreed) | figures
        if len(gold) != len(pairs):
            raise ValueError(
                f"There are {len(gold)} gold answers and {len(pairs)} predictions; expected one for each."
            )
        if any(right is None or right != right for right in gold):  # NaN differs from itself
            raise ValueError("A gold answer is None or NaN; expected a text or a number for each prediction.")
        student_right, teacher_right = (
            [match(answer, str(right), tolerance) for answer, right in zip(side, gold, strict=True)]
            for side in (predictions, references)
        )
        accuracies = {
            "student_accuracy": sum(student_right) / len(pairs),
            "teacher_accuracy": sum(teacher_right) / len(pairs),
        }
        return agreement(agreed, teacher_right) | figures | accuracies
