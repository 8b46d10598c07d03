"""Skew KL: one model against a mixture that contains a little of itself, so that the gradient stays bounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfkd.losses.base import Divergence, Temperature
from hfkd.losses.slope import mixture_of, with_slope


class _Skew(Divergence):
    def __init__(
        self, skew: float = 0.1, temperature: Temperature = 1.0, scale_by_temperature_squared: bool = True
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        if not 0 < skew < 1:
            plain = self.key.removeprefix("skew_")
            raise ValueError(
                f"{self.key}: skew is {skew}; expected a number strictly between 0 and 1. For 0 use {plain}; 1 is 0 "
                f"everywhere."
            )
        self.skew = float(skew)

    def settings(self) -> dict[str, Any]:
        """The skew and what every divergence has."""
        return {"skew": self.skew, **super().settings()}


class SkewForwardKL(_Skew):
    """Punishes a student that misses what the teacher finds likely, with a bound on what one token can cost.

    Formula:
        KL(p || skew p + (1 - skew) q), p the teacher, q the student.
    Args:
        skew: The teacher's share of the mixture, strictly between 0 and 1.
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        Both distributions.
    Cost:
        O(V) per token.
    Undefined:
        Nowhere; never above -log(skew).
    Paper:
        Ko et al. (DistiLLM), 2024, https://arxiv.org/abs/2402.03898.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> round(SkewForwardKL().between(student, teacher).item(), 4)
        0.3071
    """

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], KL(teacher || mixture)."""
        with torch.no_grad():
            believed, likely = student.exp(), teacher.exp()
            mixture = mixture_of(likely, believed, self.skew)
            # Minus the teacher's probability times the student's share of the mixture, which is at most 1.
            slope = believed.div_(mixture).mul_(likely)
            values = (teacher - mixture.log_()).mul_(likely).sum(dim=-1)
        return with_slope(student, values, slope, self.skew - 1)


class SkewReverseKL(_Skew):
    """Punishes a student that believes what the teacher doesn't, with a bound on what one token can cost.

    Formula:
        KL(q || skew q + (1 - skew) p), p the teacher, q the student.
    Args:
        skew: The student's share of the mixture, strictly between 0 and 1.
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        Both distributions.
    Cost:
        O(V) per token.
    Undefined:
        Nowhere; never above -log(skew).
    Paper:
        Ko et al. (DistiLLM), 2024, https://arxiv.org/abs/2402.03898.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> round(SkewReverseKL().between(student, teacher).item(), 4)
        0.3653
    """

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], KL(student || mixture)."""
        with torch.no_grad():
            believed = student.exp()
            mixture = mixture_of(believed, teacher.exp(), self.skew)
            share = believed / mixture
            gap = student - mixture.log_()
            values = (gap * believed).sum(dim=-1)
            slope = gap.sub_(share, alpha=self.skew).mul_(believed)
        return with_slope(student, values, slope)
