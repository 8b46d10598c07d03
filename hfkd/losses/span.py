"""How the tokens of a span go together: what neighbouring rows have in common, at the teacher and at the student."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hfkd.losses.base import Divergence, Temperature
from hfkd.losses.slope import with_slope
from hfkd.named import import_function
from hfkd.rows import RowLayout
from hfkd.support import TokenChunk

Spans = Callable[[list[int]], Sequence[tuple[int, int]]]
"""Given the supervised ids of one answer: its spans, as (start, end) without the end."""

_RUN = 64
"""Rows outside all spans that are handed on together."""


class SpanCorrelation(Divergence):
    """Punishes a student whose neighbouring tokens within a span have other candidates in common than the teacher's.

    Formula:
        scale sum_v (p_i(v) p_{i+1}(v) - q_i(v) q_{i+1}(v))^2 for the rows i and i + 1 of a span, p the teacher, q the
        student; charged to row i + 1. The first row of a span and the rows outside all spans cost 0.
    Args:
        spans: What a span is: a number n >= 2 for runs of n tokens, or a function (itself, or its name as
            package.module:function) that is given the supervised ids of an answer as a list and returns pairs (start,
            end) that don't overlap; `end` is the first id that doesn't belong to it.
        scale: A factor, > 0; products of probabilities are small.
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Off by default: the value isn't nats.
    Reads:
        Both distributions of all rows of a span. Of sparse rows all ids that any row of the span lists, or the student
        finds as likely; an id that a row doesn't list has no mass there.
    Cost:
        O(V) per token, about a KL; rows of a span are projected together.
    Undefined:
        Nowhere.
    Paper:
        Liu et al. (MGSR), 2024, https://arxiv.org/abs/2407.10068, the third of its terms, with spans from a chunker.
        There is no official code: the square and the runs of n tokens are ours.
    Example:
        >>> import torch
        >>> student = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
        >>> teacher = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log()
        >>> round(SpanCorrelation().between(student, teacher).sum().item(), 4)
        0.3712
    """

    may_stand_alone = False
    why_not_alone = "what neighbouring tokens have in common doesn't tell what each of them should be."

    def __init__(
        self,
        spans: int | str | Spans = 4,
        scale: float = 1.0,
        temperature: Temperature = 1.0,
        scale_by_temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        if not 0 < scale < math.inf:
            raise ValueError(f"{self.key}: scale is {scale}; expected a number above 0 (1 leaves the value as it is).")
        self.scale = float(scale)
        self.spans = import_function(spans, f"{self.key}: spans") if isinstance(spans, str) else spans
        whole = isinstance(self.spans, int) and not isinstance(self.spans, bool) and self.spans >= 2
        if not whole and not callable(self.spans):
            raise ValueError(
                f"{self.key}: spans is {spans!r}; expected a number of at least 2 for runs of that many tokens (one "
                "alone has no neighbour), or a function, or its name as package.module:function."
            )

    def groups(self, layout: RowLayout) -> Tensor:
        """Return [N], the number of each row's span; below 0 outside all spans.

        Raises:
            ValueError: The spans of an answer overlap, are empty or lie outside it.
        """
        if len(layout) == 0:
            return layout.sequence
        if isinstance(self.spans, int):
            run = layout.position // self.spans
            return torch.unique(layout.sequence * (run.max() + 1) + run, return_inverse=True)[1]
        if layout.targets is None:
            raise ValueError(
                f"{self.key} finds its spans with a function that reads the ids of an answer, but the rows came "
                "without their targets. Give the objective a layout with targets, or a number for `spans`."
            )
        answers: dict[int, list[int]] = {}
        for row, sequence in enumerate(layout.sequence.tolist()):
            answers.setdefault(sequence, []).append(row)
        ids, numbers, found = layout.targets.tolist(), [-1] * len(layout), 0
        for rows in answers.values():
            for start, end in self._checked(self.spans([ids[row] for row in rows]), len(rows)):
                for row in rows[start:end]:
                    numbers[row] = found
                found += 1
        outside = [row for row, number in enumerate(numbers) if number < 0]
        for place, row in enumerate(outside):
            numbers[row] = -1 - place // _RUN
        return torch.tensor(numbers, device=layout.sequence.device)

    def _checked(self, spans: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
        """The spans in order, or an error."""
        try:
            pairs = sorted((int(start), int(end)) for start, end in spans)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.key}: {_name_of(self.spans)} returned {spans!r}; expected a list of pairs (start, end)."
            ) from error
        reached = 0
        for start, end in pairs:
            if start < reached or end <= start or end > length:
                raise ValueError(
                    f"{self.key}: {_name_of(self.spans)} returned the spans {pairs} for an answer of {length} ids; "
                    f"({start}, {end}) is empty, outside the answer or overlaps with the one before. Expected pairs "
                    f"(start, end) with 0 <= start < end <= {length} that share no id."
                )
            reached = end
        return pairs

    def compare(self, chunk: TokenChunk) -> Tensor:
        """Return [n], what each row costs together with the one before."""
        if len(chunk) < 2 or (chunk.group is not None and chunk.group < 0):
            return chunk.logits()[0][:, 0] * 0.0
        if not chunk.sparse:
            return self.between(*chunk.log_probs(self.temperature))
        listed = chunk.logits()[1].shape[-1]
        return self.between(*chunk.shared_log_probs(listed, self.temperature))

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], what each row costs together with the one before; the n rows are one span."""
        pairs = student[:-1] + student[1:]
        with torch.no_grad():
            ours = pairs.exp()
            gap = (teacher[:-1] + teacher[1:]).exp_().sub_(ours)
            values = gap.square().sum(dim=-1) * self.scale
            slope = gap.mul_(ours).mul_(-2.0 * self.scale)
        return torch.nn.functional.pad(with_slope(pairs, values, slope), (1, 0))

    def settings(self) -> dict[str, Any]:
        """What a span is, the factor, and what every divergence has."""
        spans = self.spans if isinstance(self.spans, int) else _name_of(self.spans)
        return {"spans": spans, "scale": self.scale, **super().settings()}


def _name_of(function: Spans) -> str:
    """package.module:function."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"
