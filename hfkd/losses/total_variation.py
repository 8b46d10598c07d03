"""Total variation distance."""

from __future__ import annotations

from torch import Tensor

from hfkd.losses.base import Divergence


class TotalVariation(Divergence):
    """Punishes the probability mass that lies in the wrong place, however small the probabilities are.

    Formula:
        1/2 sum_v |p(v) - q(v)|, p the teacher, q the student.
    Args:
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        Both distributions.
    Cost:
        O(V) per token.
    Undefined:
        Its gradient jumps where p(v) = q(v); there it is taken as 0. A share of mass between 0 and 1, not nats.
    Paper:
        Wen et al. (f-distillation), 2023, https://arxiv.org/abs/2307.15190.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> round(TotalVariation().between(student, teacher).item(), 4)
        0.4
    """

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], half the L1 distance."""
        return 0.5 * (student.exp() - teacher.exp()).abs().sum(dim=-1)
