"""Normalised distillation: the text's own token and all other entries are taught apart from each other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hfkd.losses.base import Divergence, Temperature
from hfkd.losses.slope import with_slope
from hfkd.support import TokenChunk


class NormalizedKD(Divergence):
    """Punishes a student that finds the text's token unlikely, as far as the teacher finds it likely, and one that
    spreads the rest of the mass otherwise than the teacher does.

    Formula:
        -p1(y) log q1(y) - non_target_weight temperature^2 sum_{i != y} p'(i) log q'(i), y the target's entry; p1 and
        q1 are teacher and student at temperature 1, p' and q' at `temperature`, without y and scaled to a sum of 1.
    Args:
        non_target_weight: The weight of the second part, >= 0.
        temperature: Divides both models' logits in the second part, > 0. For a teacher that gave top-k rows only 1.
        scale_by_temperature_squared: Multiply the second part by temperature ** 2.
    Reads:
        Both distributions and the target ids. Where a sparse teacher doesn't list the target, y is its tail.
    Cost:
        O(V) per token, about twice a KL; at a temperature other than 1 about three times.
    Undefined:
        Nowhere. A cross-entropy and so not 0 at equality: there it is what the teacher's own uncertainty costs. Where
        all mass lies on y, the rest is compared by its logits all the same. Where y is the only entry, the second part
        is 0.
    Paper:
        Yang et al. (NKD), 2023, https://arxiv.org/abs/2303.13005.
    Example:
        >>> import torch
        >>> from hfkd.support import TokenChunk
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.5, -1.0]]), torch.tensor([[3.0, 1.5, 0.0, -2.0]])
        >>> round(NormalizedKD()(TokenChunk.from_logits(torch.tensor([0]), student, teacher)).item(), 4)
        1.4252
    """

    def __init__(
        self, non_target_weight: float = 1.5, temperature: Temperature = 1.0, scale_by_temperature_squared: bool = True
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        if not 0 <= non_target_weight < math.inf:
            raise ValueError(
                f"{self.key}: non_target_weight is {non_target_weight}; expected a finite number of at least 0 (0 "
                "leaves the target's part alone)."
            )
        self.non_target_weight = float(non_target_weight)

    def forward(self, chunk: TokenChunk) -> Tensor:
        """Return [n], both parts of each token's cost.

        Raises:
            ValueError: The teacher's rows are sparse and the temperature isn't 1.
        """
        if chunk.sparse and self.temperature != 1.0:
            raise ValueError(
                f"{self.key}: temperature is {self.temperature}, but the teacher gave top-k rows, which tell its "
                "probability of the target at one temperature only; expected 1, for the rows and for the loss. Use "
                "temperature 1, or a teacher with whole distributions."
            )
        places = chunk.target_places()
        target = _target_part(*chunk.log_probs(1.0), places)
        others = _others_part(*chunk.log_probs(self.temperature), places)
        scale = self.temperature**2 if self.scale_by_temperature_squared else 1.0
        return target + self.non_target_weight * scale * others

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], both parts, with the teacher's likeliest entry in place of the target."""
        places = teacher.argmax(dim=-1)
        return _target_part(student, teacher, places) + self.non_target_weight * _others_part(student, teacher, places)

    def settings(self) -> dict[str, Any]:
        """The weight of the second part and what every divergence has."""
        return {"non_target_weight": self.non_target_weight, **super().settings()}


def _target_part(student: Tensor, teacher: Tensor, places: Tensor) -> Tensor:
    """[n] the cross-entropy's summand at the target."""
    column = places[:, None]
    return -(teacher.gather(-1, column).exp() * student.gather(-1, column))[:, 0]


def _others_part(student: Tensor, teacher: Tensor, places: Tensor) -> Tensor:
    """[n] the cross-entropy of what is left without the target."""
    with torch.no_grad():
        column = places[:, None]
        if student.shape[-1] == 1:
            return with_slope(student, student.new_zeros(len(student)), torch.zeros_like(student))
        # Normalised from the logarithms: one minus the target's probability would have nothing left to divide by.
        likely = torch.softmax(teacher.scatter(-1, column, -math.inf), dim=-1)
        kept = torch.log_softmax(student.scatter(-1, column, -math.inf), dim=-1)
        slope = kept.exp().sub_(likely)
        values = -kept.scatter_(-1, column, 0.0).mul_(likely).sum(dim=-1)
    return with_slope(student, values, slope)
