"""Sinkhorn distance between a group of student rows and a group of teacher rows (SinKD).

Rows of a group are compared with each other, so the grouping is part of what the loss is. All of it runs in log space
and float32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from hfkd.losses.base import Divergence
from hfkd.rows import RowLayout
from hfkd.support import TokenChunk

_MODES = ("tokens", "sequence", "batch")


class Sinkhorn(Divergence):
    """Punishes the cost of moving the student's distributions of a group onto the teacher's, whichever row goes to
    which.

    Formula:
        sum_j Pi(i, j) C(i, j) for row i, C(i, j) = |q_i - p_j|_1, Pi the plan of `iterations` Sinkhorn steps (rows,
        then columns to a sum of 1) on exp(-C / epsilon), p the teacher, q the student. Summed over the n rows and
        divided by their number it is <Pi, C> / n.
    Args:
        epsilon: Entropic smoothing, > 0, in units of the cost (which lies between 0 and 2).
        iterations: Sinkhorn steps, >= 1.
        mode: Which rows make a group: `tokens` (runs of `group_size` supervised tokens), `sequence` (the tokens of one
            sequence), `batch` (the same answer position over the sequences of a batch, as in the paper's
            classification tasks).
        group_size: Rows of a group in mode `tokens`.
        debias: Subtract half the cost of each side to itself, which makes it 0 for equal groups.
        detach_plan: Send the gradient through the cost only.
        alone: Allow it as the only term. A student that answers each question with a neighbour's distribution pays
            nothing here.
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Off by default: the value is a cost between 0 and 2, not nats.
    Reads:
        Both distributions of all rows of a group on this process; rows of other processes or micro-batches are not
        seen.
    Cost:
        O(n V) per token for groups of n, and `iterations` steps on an [n, n] matrix.
    Undefined:
        Nowhere. Without `debias` it is not 0 at equality when the rows of a group are alike.
    Paper:
        Cui et al. (SinKD), 2024, https://arxiv.org/abs/2402.17110. `debias`, the modes for tokens and the division by
        rows are ours.
    Example:
        >>> import torch
        >>> student = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.3, 0.4]]).log()
        >>> teacher = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]).log()
        >>> round(Sinkhorn().between(student, teacher).sum().item(), 4)
        1.2296
    """

    def __init__(
        self,
        epsilon: float = 0.1,
        iterations: int = 20,
        mode: Literal["tokens", "sequence", "batch"] = "tokens",
        group_size: int = 64,
        debias: bool = False,
        detach_plan: bool = False,
        alone: bool = False,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        if not epsilon > 0 or iterations < 1 or group_size < 1:
            raise ValueError(
                f"{self.key}: got epsilon {epsilon}, iterations {iterations}, group_size {group_size}; expected "
                f"epsilon above 0 and the "
                "other two at least 1."
            )
        if mode not in _MODES:
            raise ValueError(f"{self.key}: mode is {mode!r}; expected one of {', '.join(_MODES)}.")
        self.epsilon, self.iterations, self.mode, self.group_size = (
            float(epsilon),
            int(iterations),
            mode,
            int(group_size),
        )
        self.debias, self.detach_plan, self.may_stand_alone = debias, detach_plan, alone

    def groups(self, layout: RowLayout) -> Tensor:
        """Return [N], the group of each row."""
        if self.mode == "sequence":
            return layout.sequence
        if self.mode == "batch":
            return layout.position
        return torch.arange(len(layout), device=layout.sequence.device) // self.group_size

    def forward(self, chunk: TokenChunk) -> Tensor:
        """Return [n], each row's share of the transport cost.

        Raises:
            ValueError: The teacher's rows are sparse; their supports differ from row to row.
        """
        if chunk.sparse:
            raise ValueError(
                f"{self.key} compares rows with each other, but the teacher gave top-k rows, whose ids differ from "
                f"row "
                "to row. Use a teacher with whole distributions, or a loss that reads each row alone."
            )
        return super().forward(chunk)

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], each student row's share of the transport cost; the n rows are one group."""
        ours, theirs = student.exp(), teacher.exp()
        values = self._transport(ours, theirs)
        if self.debias:
            values = values - 0.5 * (self._transport(ours, ours) + self._transport(theirs, theirs))
        return values

    def _transport(self, first: Tensor, second: Tensor) -> Tensor:
        cost = torch.cdist(first, second, p=1)
        kernel = -cost / self.epsilon
        columns = kernel.new_zeros(kernel.shape[1])
        for _ in range(self.iterations):
            rows = -torch.logsumexp(kernel + columns[None, :], dim=1)
            columns = -torch.logsumexp(kernel + rows[:, None], dim=0)
        plan = (kernel + rows[:, None] + columns[None, :]).exp()
        return ((plan.detach() if self.detach_plan else plan) * cost).sum(dim=1)

    def settings(self) -> dict[str, Any]:
        """Everything that defines the transport."""
        names = ("epsilon", "iterations", "mode", "group_size", "debias", "detach_plan")
        return {**{name: getattr(self, name) for name in names}, "alone": self.may_stand_alone, **super().settings()}
