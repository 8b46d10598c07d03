"""The order of the teacher's favourites: which of two tokens is the likelier, whatever the probabilities."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from hfkd.losses.base import Temperature
from hfkd.losses.logits import LogitDivergence


class _Ranking(LogitDivergence):
    may_stand_alone = False
    why_not_alone = "the order of some tokens says nothing about their probabilities, nor about all other tokens."

    def __init__(
        self, top: int = 8, temperature: Temperature = 1.0, scale_by_temperature_squared: bool = True
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        if not top >= 2:
            raise ValueError(f"{self.key}: top is {top}; expected at least 2 tokens, because pairs are compared.")
        self.top = int(top)

    @abstractmethod
    def _cost(self, lead: Tensor) -> Tensor:
        """What a pair costs whose first, by the teacher the likelier one, leads by so much at the student."""

    def between_logits(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], the mean cost of the pairs."""
        found = teacher.topk(min(self.top, teacher.shape[-1]), dim=-1)
        first, second = torch.triu_indices(*[found.values.shape[-1]] * 2, offset=1, device=student.device)
        ours = student.gather(-1, found.indices)
        cost = self._cost((ours[:, first] - ours[:, second]) / self.temperature)
        decided = found.values[:, first] != found.values[:, second]
        return (cost * decided).sum(dim=-1) / max(1, len(first))

    def settings(self) -> dict[str, Any]:
        """How many tokens are put in order, and what every divergence has."""
        return {"top": self.top, **super().settings()}


class HingeRanking(_Ranking):
    """Punishes a student that doesn't put the teacher's likeliest tokens in the teacher's order, by a clear lead.

    Formula:
        Mean over the pairs i < j of the teacher's `top` likeliest ids, in their order, of max(0, margin -
        (s_i - s_j) / temperature), s the student's logits; 0 for a pair that is equally likely to the teacher.
    Args:
        top: Ids that are put in order, >= 2.
        margin: The lead, in logits divided by the temperature, that is enough, >= 0.
        temperature: Divides the student's logits, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        The student's logits of the teacher's likeliest ids, and the teacher's order of them.
    Cost:
        O(V) per token to find the likeliest ids, then O(top^2).
    Undefined:
        Its gradient jumps where a lead is just enough. Not 0 at equality: the teacher itself may lead by less than the
        margin. Not nats.
    Paper:
        None: the pairwise hinge of learning to rank (Herbrich et al., 2000), put to the teacher's order.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 1.0]])
        >>> round(HingeRanking().between_logits(student, teacher).item(), 4)
        2.3333
    """

    def __init__(
        self,
        top: int = 8,
        margin: float = 1.0,
        temperature: Temperature = 1.0,
        scale_by_temperature_squared: bool = True,
    ) -> None:
        super().__init__(top, temperature, scale_by_temperature_squared)
        if not 0 <= margin < math.inf:
            raise ValueError(
                f"{self.key}: margin is {margin}; expected a finite number of at least 0 (0 asks for the order alone)."
            )
        self.margin = float(margin)

    def _cost(self, lead: Tensor) -> Tensor:
        return torch.relu(self.margin - lead)

    def settings(self) -> dict[str, Any]:
        """The margin and what every ranking has."""
        return {"margin": self.margin, **super().settings()}


class LogisticRanking(_Ranking):
    """Punishes a student that finds it unlikely that the teacher's order of its likeliest tokens is the right one.

    Formula:
        Mean over the pairs i < j of the teacher's `top` likeliest ids, in their order, of log(1 + exp(-(s_i - s_j) /
        temperature)), s the student's logits; 0 for a pair that is equally likely to the teacher.
    Args:
        top: Ids that are put in order, >= 2.
        temperature: Divides the student's logits, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        The student's logits of the teacher's likeliest ids, and the teacher's order of them.
    Cost:
        O(V) per token to find the likeliest ids, then O(top^2).
    Undefined:
        Nowhere. Not 0 at equality: a larger lead always costs less, so that it goes on pulling the logits apart.
        Nats of a pair, not of a token.
    Paper:
        Burges et al. (RankNet), 2005, https://dl.acm.org/doi/10.1145/1102351.1102363, put to the teacher's order.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 1.0]])
        >>> round(LogisticRanking().between_logits(student, teacher).item(), 4)
        1.5845
    """

    def _cost(self, lead: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-lead)
