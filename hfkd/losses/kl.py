"""Kullback-Leibler divergence in its two directions. Both are 0 where student and teacher agree: they are no
cross-entropies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfkd.losses.base import Divergence
from hfkd.losses.slope import with_slope
from hfkd.support import TokenChunk


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of log-probabilities [n, S], in nats [n]."""
    return (first.exp() * (first - second)).sum(dim=-1)


class ForwardKL(Divergence):
    """Punishes a student that gives little probability to what the teacher finds likely (it covers the teacher's
    modes).

    Formula:
        KL(teacher || student) = sum_v p(v) (log p(v) - log q(v)), p the teacher, q the student.
    Args:
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        Both distributions. Of a teacher that is known through drawn ids, an estimate that is right on average.
    Cost:
        O(V) per token.
    Undefined:
        Nowhere for finite logits. Where q(v) is exactly 0 and p(v) is not, log q(v) counts as -1e4.
    Paper:
        Hinton, Vinyals and Dean, 2015, https://arxiv.org/abs/1503.02531.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> round(ForwardKL().between(student, teacher).item(), 4)
        0.3681
    """

    reads_samples = True

    def compare(self, chunk: TokenChunk) -> Tensor:
        """Return [n], KL(teacher || student); of a teacher that is known through drawn ids an estimate that is right
        on average, in value and gradient.
        """
        if not chunk.sampled:
            return super().compare(chunk)
        student, teacher, weights = chunk.samples(self.temperature)
        return (weights * (teacher - student)).sum(dim=-1)

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], KL(teacher || student)."""
        with torch.no_grad():
            likely = teacher.exp()
            values = (teacher - student).mul_(likely).sum(dim=-1)
        return with_slope(student, values, likely.neg_())


class ReverseKL(Divergence):
    """Punishes a student that gives probability to what the teacher finds unlikely (it seeks a mode).

    Formula:
        KL(student || teacher) = sum_v q(v) (log q(v) - log p(v)), p the teacher, q the student.
    Args:
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        Both distributions.
    Cost:
        O(V) per token.
    Undefined:
        Nowhere for finite logits. Where p(v) is exactly 0 and q(v) is not, it would be infinite; log p(v) counts as
        -1e4.
    Paper:
        Gu et al. (MiniLLM), 2023, https://arxiv.org/abs/2306.08543, use it on the student's own text.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> round(ReverseKL().between(student, teacher).item(), 4)
        0.5108
    """

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], KL(student || teacher)."""
        with torch.no_grad():
            cost = (student - teacher).mul_(student.exp())
            values = cost.sum(dim=-1)
        return with_slope(student, values, cost)
