"""How alike the texts are in which student and teacher come to their answers."""

from __future__ import annotations

from typing import Any

import evaluate

from hfkd.eval.metrics import inputs
from hfkd.eval.similarity import bleu, rouge_l

_CITATION = "After https://arxiv.org/abs/2505.15442. BLEU: Post, 2018, W18-6319. ROUGE-L: Lin, 2004, W04-1013."
_INPUTS = """
Args:
    predictions: [n] what the student wrote.
    references: [n] what the teacher wrote.

Returns:
    `bleu` (0 to 100, of all texts together, sacreBLEU), `rouge_l` (0 to 1, the mean of each pair's F1), `texts`.
"""


class RationaleSimilarity(inputs.CheckedMetric):
    """sacreBLEU and ROUGE-L of the student's texts, the teacher's being the references."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(self.__doc__, _INPUTS, _CITATION, predictions="string", references="string")

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        inputs.require(predictions, "predictions")
        students, teachers = list(predictions), list(references)
        pairs = [rouge_l(student, teacher) for student, teacher in zip(students, teachers, strict=True)]
        return {"bleu": bleu(students, teachers), "rouge_l": sum(pairs) / len(pairs), "texts": len(pairs)}
