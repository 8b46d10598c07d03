"""The family of alpha-beta divergences: two powers that say how much what the teacher and what the student finds
likely counts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hfkd.losses.base import Divergence, Temperature
from hfkd.losses.slope import with_slope


class AlphaBeta(Divergence):
    """Punishes between the forward and the reverse KL, and beyond them, as two powers say.

    Formula:
        -1/(a b) sum_v [p^a q^b - a/(a + b) p^(a + b) - b/(a + b) q^(a + b)], a = teacher_power, b = student_power, p
        the teacher, q the student, each at v. With b = 0 it is 1/a^2 sum_v [q^a - p^a + a p^a (log p - log q)], with
        a = 0 it is 1/b^2 sum_v [p^b - q^b + b q^b (log q - log p)]: the limits. So (1, 0) is `forward_kl`, (0, 1)
        `reverse_kl`, (1/2, 1/2) four times the squared Hellinger distance, (1, 1) half the squared difference.
    Args:
        teacher_power: a >= 0. A large one looks at what the teacher finds likely.
        student_power: b >= 0, not 0 along with `teacher_power`. A large one looks at what the student finds likely.
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        Both distributions.
    Cost:
        O(V) per token, about twice a KL.
    Undefined:
        Nowhere for finite logits. Where a power is 0, probabilities of exactly 0 count as in `forward_kl` and
        `reverse_kl`. Powers near 0 that aren't 0 divide a difference of small numbers by small numbers: below about
        0.01 take 0.
    Paper:
        Wang et al. (ABKD), 2025, https://arxiv.org/abs/2505.04560. The defaults are ours (the authors' recipe for
        classifying images has 0.8 and 0.3). Their code has 1/a and 1/b for 1/a^2 and 1/b^2 in the two limits.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> round(AlphaBeta(1.0, 1.0).between(student, teacher).item(), 4)
        0.16
    """

    def __init__(
        self,
        teacher_power: float = 0.2,
        student_power: float = 0.7,
        temperature: Temperature = 1.0,
        scale_by_temperature_squared: bool = True,
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        powers = (teacher_power, student_power)
        if not all(0 <= power < math.inf for power in powers) or not any(powers):
            raise ValueError(
                f"{self.key}: got teacher_power {teacher_power}, student_power {student_power}; expected two numbers "
                "of at least 0, one of them above 0 (1 and 0 are forward_kl, 0 and 1 are reverse_kl)."
            )
        self.teacher_power, self.student_power = float(teacher_power), float(student_power)

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], the divergence."""
        with torch.no_grad():
            if self.student_power == 0:
                values, slope = _forward_end(student, teacher, self.teacher_power)
            elif self.teacher_power == 0:
                values, slope = _reverse_end(student, teacher, self.student_power)
            else:
                values, slope = _inside(student, teacher, self.teacher_power, self.student_power)
        return with_slope(student, values, slope)

    def settings(self) -> dict[str, Any]:
        """Both powers and what every divergence has."""
        return {"teacher_power": self.teacher_power, "student_power": self.student_power, **super().settings()}


def _power(log_probs: Tensor, power: float) -> Tensor:
    return log_probs.exp() if power == 1.0 else (log_probs * power).exp_()


def _inside(student: Tensor, teacher: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """The value [n] and its slope [n, S] for two powers above 0. The three sums are put together so that each entry is
    a difference times a power: it is 0 where both are equal.
    """
    ours, theirs = _power(student, b), _power(teacher, a)
    # a p^a (p^b - q^b)
    left = (_power(teacher, b) - ours).mul_(theirs).sum(dim=-1)
    # b q^b (q^a - p^a)
    slope = (_power(student, a) if a != b else ours.clone()).sub_(theirs).mul_(ours)
    return (a * left + b * slope.sum(dim=-1)) / (a * b * (a + b)), slope.div_(a)


def _forward_end(student: Tensor, teacher: Tensor, power: float) -> tuple[Tensor, Tensor]:
    theirs = _power(teacher, power)
    slope = _power(student, power).sub_(theirs)
    gaps = (teacher - student).mul_(theirs).sum(dim=-1)
    return slope.sum(dim=-1) / power**2 + gaps / power, slope.div_(power)


def _reverse_end(student: Tensor, teacher: Tensor, power: float) -> tuple[Tensor, Tensor]:
    ours = _power(student, power)
    rest = _power(teacher, power).sub_(ours).sum(dim=-1)
    slope = (student - teacher).mul_(ours)
    return rest / power**2 + slope.sum(dim=-1) / power, slope
