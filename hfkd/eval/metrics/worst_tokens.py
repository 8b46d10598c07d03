"""At which tokens of the text the student is furthest from the teacher."""

from __future__ import annotations

from typing import Any

import evaluate

from hfkd.eval.metrics import inputs
from hfkd.measures import divergence, worst_tokens

_INPUTS = """
Args:
    predictions: [n, V] log-probabilities (nats) or logits of the student.
    references: [n, V] those of the teacher.
    gold: [n] the ids that the text has.
    count: How many tokens.
    tokenizer: Turns ids into text; optional, without one the ids stand for themselves.

Returns:
    `worst_tokens`, by falling `total`: `text`, `tokens` (how often it occurs), `forward_kl` (mean, nats), `total`
    (nats), and what `student` and `teacher` find likeliest there most often.
"""


class WorstTokens(inputs.CheckedMetric):
    """The tokens with the largest sum of KL(teacher || student) over all their occurrences."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(self.__doc__, _INPUTS, predictions=inputs.ROWS, references=inputs.ROWS)

    def _compute(
        self, predictions: Any, references: Any, gold: Any = None, count: int = 10, tokenizer: Any = None
    ) -> dict[str, Any]:
        inputs.require(predictions, "predictions")
        chunk = inputs.chunk_of(
            predictions, references, inputs.ids_of(gold, "gold", len(predictions), len(predictions[0]))
        )
        student, teacher = chunk.log_probs()
        columns = chunk.targets, student.argmax(dim=-1), teacher.argmax(dim=-1), divergence(teacher, student)
        name = str if tokenizer is None else lambda number: tokenizer.decode([number])
        return {"worst_tokens": worst_tokens(*(each.numpy() for each in columns), count=count, name=name)}
