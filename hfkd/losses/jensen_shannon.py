"""The generalised Jensen-Shannon divergence: both models against a mixture of them, so that it is bounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfkd.losses.base import Divergence, Temperature
from hfkd.losses.slope import mixture_of, with_slope


class JensenShannon(Divergence):
    """Punishes either model's distance from their mixture; never above log 2, so that single tokens can't dominate.

    Formula:
        w KL(q || m) + (1 - w) KL(p || m), m = w q + (1 - w) p, w = mixture_weight, p the teacher, q the student.
    Args:
        mixture_weight: The student's share of the mixture, strictly between 0 and 1. At either end it is 0 everywhere:
            take `forward_kl` or `reverse_kl` there. Near 0 it is about mixture_weight * reverse KL, near 1 about (1 -
            mixture_weight) * forward KL.
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        Both distributions.
    Cost:
        O(V) per token, about twice a KL.
    Undefined:
        Nowhere.
    Paper:
        Agarwal et al. (GKD), 2023, https://arxiv.org/abs/2306.13649; their code swaps in the two KLs at the ends,
        where its scale jumps.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 1e-9]]).log(), torch.tensor([[1e-9, 1.0]]).log()
        >>> round(JensenShannon().between(student, teacher).item(), 4)
        0.6931
    """

    def __init__(
        self, mixture_weight: float = 0.5, temperature: Temperature = 1.0, scale_by_temperature_squared: bool = True
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        if not 0 < mixture_weight < 1:
            raise ValueError(
                f"{self.key}: mixture_weight is {mixture_weight}; expected a number strictly between 0 and 1, because "
                f"at both ends the "
                "divergence is 0 whatever the student does. Use forward_kl or reverse_kl instead."
            )
        self.mixture_weight = float(mixture_weight)

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], the divergence from the mixture."""
        weight = self.mixture_weight
        with torch.no_grad():
            believed, likely = student.exp(), teacher.exp()
            mixture = mixture_of(believed, likely, weight).log_()
            ours = (student - mixture).mul_(believed)
            theirs = mixture.neg_().add_(teacher).mul_(likely).sum(dim=-1)
            values = weight * ours.sum(dim=-1) + (1 - weight) * theirs
        return with_slope(student, values, ours, weight)

    def settings(self) -> dict[str, Any]:
        """The mixture weight and what every divergence has."""
        return {"mixture_weight": self.mixture_weight, **super().settings()}
