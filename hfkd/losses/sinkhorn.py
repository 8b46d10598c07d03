"""Sinkhorn distance between a group of student rows and a group of teacher rows (SinKD).

Rows of a group are compared with each other, so the grouping is part of what the loss is. All of it runs in log space
and float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from hfkd.losses.base import Divergence, Temperature
from hfkd.rows import RowLayout
from hfkd.support import TokenChunk

_MODES = ("tokens", "sequence", "batch")

Cost = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From rows [n, S] and [m, S] to the costs [n, m] of moving one onto the other, and what each row's may lack [n]."""


class Sinkhorn(Divergence):
    """Punishes the cost of moving the student's distributions of a group onto the teacher's, whichever row goes to
    which.

    Formula:
        sum_j Pi(i, j) C(i, j) + pair_weight C(i, i) for row i, C(i, j) = |q_i - p_j|_1, Pi the plan of `iterations`
        Sinkhorn steps (rows, then columns to a sum of 1) on exp(-C / epsilon), p the teacher, q the student. Summed
        over the n rows and divided by their number it is <Pi, C> / n. With `support` the cost of a pair is taken over
        the union of the likeliest ids, so many of q_i and so many of p_j, and one entry for the rest of each: at most
        the whole cost, and below it by no more than 2 min(rest of q_i, rest of p_j).
    Args:
        epsilon: Entropic smoothing, > 0, in units of the cost (which lies between 0 and 2).
        iterations: Sinkhorn steps, >= 1.
        mode: Which rows make a group: `tokens` (runs of `group_size` supervised tokens), `sequence` (the tokens of one
            sequence), `batch` (the same answer position over the sequences of a batch, as in the paper's
            classification tasks).
        group_size: Rows of a group in mode `tokens`; nothing to do with how many rows are projected at once.
        support: Likeliest ids of either side that a pair is compared on, >= 1; None for the whole vocabulary.
        pair_weight: Weight of each row's cost to the teacher's row at the same place, >= 0. Transport alone forgets
            which row belongs to which.
        debias: Subtract half the cost of each side to itself, which makes it 0 for equal groups.
        detach_plan: Send the gradient through the cost only.
        alone: Allow it as the only term. A student that answers each question with a neighbour's distribution pays
            nothing here.
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Off by default: the value is a cost between 0 and 2, not nats.
    Reads:
        Both distributions of all rows of a group on this process; rows of other processes or micro-batches are not
        seen. Logged: `unbalanced`, how far the plan's row sums are from 1 after the last step (0 is converged), and
        `cost_bound`, the most by which `support` may have made a row's costs too small.
    Cost:
        O(n k) per token for groups of n (O(n V) without `support`), and `iterations` steps on an [n, n] matrix.
    Undefined:
        Nowhere. Without `debias` it is not 0 at equality when the rows of a group are alike. Of a sparse teacher the
        ids that p_j lists take the place of the union, with the same bound; `debias` is refused there.
    Paper:
        Cui et al. (SinKD), 2024, https://arxiv.org/abs/2402.17110. `support`, `pair_weight`, `debias`, the modes for
        tokens and the division by rows are ours.
    Example:
        >>> import torch
        >>> student = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.3, 0.4]]).log()
        >>> teacher = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]).log()
        >>> round(Sinkhorn().between(student, teacher).sum().item(), 4)
        1.2296
    """

    why_not_alone = "it can't tell a student that gives every row its own answer from one that gives it a neighbour's."

    def __init__(
        self,
        epsilon: float = 0.1,
        iterations: int = 20,
        mode: Literal["tokens", "sequence", "batch"] = "tokens",
        group_size: int = 64,
        support: int | None = 32,
        pair_weight: float = 0.0,
        debias: bool = False,
        detach_plan: bool = False,
        alone: bool = False,
        temperature: Temperature = 1.0,
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
        if not pair_weight >= 0 or (support is not None and support < 1):
            raise ValueError(
                f"{self.key}: got pair_weight {pair_weight}, support {support}; expected a weight of 0 or more, and "
                "at least 1 id (or null for the whole vocabulary)."
            )
        self.epsilon, self.iterations, self.mode = float(epsilon), int(iterations), mode
        self.group_size, self.support, self.pair_weight = int(group_size), support, float(pair_weight)
        self.debias, self.detach_plan, self.may_stand_alone = debias, detach_plan, alone

    def groups(self, layout: RowLayout) -> Tensor:
        """Return [N], the group of each row."""
        if self.mode == "sequence":
            return layout.sequence
        if self.mode == "batch":
            return layout.position
        return torch.arange(len(layout), device=layout.sequence.device) // self.group_size

    def compare(self, chunk: TokenChunk) -> Tensor:
        """Return [n], each row's share of the transport cost.

        Raises:
            ValueError: `debias` is on and the teacher's rows are sparse.
        """
        partial = chunk.listed < chunk.vocab_size
        if partial and self.debias:
            raise ValueError(
                f"{self.key}: debias compares the teacher's rows with each other, but they are top-k rows, which say "
                "too little for that. Set debias to false, or use a teacher with whole distributions."
            )
        if self.support is None and not chunk.sparse:
            ours, theirs = (one.exp() for one in chunk.log_probs(self.temperature))
            values, unbalanced, bound = self._measured(ours, theirs, _whole_cost)
        else:
            few = min(self.support or chunk.listed, chunk.listed)
            ours, theirs = (one.exp() for one in chunk.shared_log_probs(few, self.temperature))
            cost = functools.partial(_cost_on_likeliest, k=few, second_only=partial)
            values, unbalanced, bound = self._measured(ours, theirs, cost)
        chunk.measure("unbalanced", unbalanced)
        chunk.measure("cost_bound", bound)
        return values

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], each student row's share of the transport cost; the n rows are one group, of whole
        distributions.
        """
        cost = _whole_cost
        if self.support is not None and self.support < student.shape[-1]:
            cost = functools.partial(_cost_on_likeliest, k=self.support)
        return self._measured(student.exp(), teacher.exp(), cost)[0]

    def _measured(self, ours: Tensor, theirs: Tensor, cost_of: Cost) -> tuple[Tensor, Tensor, Tensor]:
        """The values [n], what the plan's row sums lack [n], and the bound of each row's costs [n]."""
        cost, bound = cost_of(ours, theirs)
        values, unbalanced = self._transport(cost)
        if self.debias:
            values = values - 0.5 * sum(self._transport(cost_of(side, side)[0])[0] for side in (ours, theirs))
        if self.pair_weight:
            values = values + self.pair_weight * cost.diagonal()
        return values, unbalanced, bound

    def _transport(self, cost: Tensor) -> tuple[Tensor, Tensor]:
        kernel = -cost / self.epsilon
        columns = kernel.new_zeros(kernel.shape[1])
        for _ in range(self.iterations):
            rows = -torch.logsumexp(kernel + columns[None, :], dim=1)
            columns = -torch.logsumexp(kernel + rows[:, None], dim=0)
        plan = (kernel + rows[:, None] + columns[None, :]).exp()
        unbalanced = (plan.detach().sum(dim=1) - 1).abs()
        return ((plan.detach() if self.detach_plan else plan) * cost).sum(dim=1), unbalanced

    def settings(self) -> dict[str, Any]:
        """Everything that defines the transport."""
        names = (
            *("epsilon", "iterations", "mode", "group_size", "support", "pair_weight"),
            *("debias", "detach_plan"),
        )
        return {**{name: getattr(self, name) for name in names}, "alone": self.may_stand_alone, **super().settings()}


def _whole_cost(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """[n, m] L1 distances of all pairs of rows, and [n] zeros: nothing is left out."""
    return torch.cdist(first, second, p=1), first.new_zeros(len(first))


def _cost_on_likeliest(first: Tensor, second: Tensor, k: int, second_only: bool = False) -> tuple[Tensor, Tensor]:
    """The L1 distance of each pair of rows over the union of both rows' k likeliest entries, and one for the rest.

    With Q and P the masses on the union and O the overlap there, it is 2 (max(Q, P) - O).

    Args:
        first: [n, S] probabilities, of rows that may sum to less than 1.
        second: [m, S] the same.
        k: Entries of each row, at most S.
        second_only: Take the second row's entries in place of the union.

    Returns:
        [n, m] costs, and [n] the most by which a row's costs are too small.
    """
    theirs = second.detach().topk(k, dim=-1).indices
    first_there = first.index_select(1, theirs.flatten()).view(len(first), len(second), k)
    second_here = second.gather(1, theirs)
    if second_only:
        overlap = torch.minimum(first_there, second_here).sum(-1)
        most = torch.maximum(first_there.sum(-1), second_here.sum(-1))
    else:
        ours = first.detach().topk(k, dim=-1).indices
        uncounted = torch.ones_like(first).scatter_(1, ours, 0.0)
        fresh = uncounted.index_select(1, theirs.flatten()).view(first_there.shape)  # 0 for what both list
        first_there = first_there * fresh
        first_here = first.gather(1, ours)
        second_there = second.index_select(1, ours.flatten()).view(len(second), len(first), k).transpose(0, 1)
        overlap = torch.minimum(first_here[:, None], second_there).sum(-1)
        overlap = overlap + torch.minimum(first_there, second_here).sum(-1)
        first_mass = first_here.sum(-1)[:, None] + first_there.sum(-1)
        second_mass = second_there.sum(-1) + (fresh * second_here).sum(-1)
        most = torch.maximum(first_mass, second_mass)
    bound = 2 * (1 - most.detach()).clamp(min=0).amax(dim=1)
    return 2 * (most - overlap).clamp(min=0), bound
