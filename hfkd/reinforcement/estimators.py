"""Estimates of KL(student || teacher) from tokens that the student drew, as losses; autograd takes their gradient.

With R = log p(a) - log q(a) of a drawn token a, teacher p and student q, over draws from q:

| loss | value on average | gradient on average |
|---|---|---|
| -R | KL(q, p) | 0, so it is no loss and isn't here |
| k2, R**2 / 2 | something else | that of KL(q, p) |
| k3, exp(R) - R - 1 | KL(q, p) | that of KL(p, q) |

Pure arithmetic on tensors: no model, no trainer. What reads whole distributions instead of draws is a divergence of
`hfkd.losses`, such as `reverse_kl`, or `LikeliestReverseKL` below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hfkd.losses.base import Divergence, Temperature
from hfkd.rows import LOWEST


def k2(log_ratio: Tensor, limit: float | None = None) -> Tensor:
    """Half the square of the log-ratio; beyond the limit it goes on as a straight line, so that a token which the
    teacher finds absurd still pulls, but not without bound.

    Args:
        log_ratio: Any shape, R in nats; the student's part in the graph.
        limit: The largest |R| (nats) that is squared; None for none. Within it the gradient is exact on average.
    """
    if limit is None:
        return 0.5 * log_ratio.square()
    size = log_ratio.abs()
    inside = size.clamp(max=limit)
    return inside * (size - 0.5 * inside)


def k3(log_ratio: Tensor, limit: float | None = None) -> Tensor:
    """exp(R) - R - 1; a token whose |R| is beyond the limit has the value at the limit and no gradient.

    Args:
        log_ratio: Any shape, R in nats; the student's part in the graph.
        limit: The largest |R| (nats); None for none. exp(R) explodes on a token that the teacher finds far likelier.
    """
    held = log_ratio if limit is None else log_ratio.clamp(-limit, limit)
    return held.exp() - held - 1


ESTIMATORS: Mapping[str, Callable[[Tensor, float | None], Tensor]] = MappingProxyType({"k2": k2, "k3": k3})
"""Those that read nothing but the drawn tokens."""


def bounded_ratio(new: Tensor, old: Tensor, low: float, high: float) -> Tensor:
    """How much likelier a token is now than when it was drawn, held near 1 and out of the graph: the factor of an
    estimate on tokens that earlier weights drew.

    Args:
        new: Log-probabilities (nats) under the weights of now.
        old: The same shape, under the weights that drew.
        low: How far below 1 it may be.
        high: How far above.
    """
    return (new.detach() - old).exp().clamp(1 - low, 1 + high)


class LikeliestReverseKL(Divergence):
    """Reverse KL over the tokens that the student itself finds likeliest, all others as one entry.

    Formula:
        sum over v in top of q(v) (log q(v) - log p(v)) + q(rest) (log q(rest) - log p(rest)), q the student, p the
        teacher, top the student's likeliest ids
    Args:
        candidates: How many ids.
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        Both distributions.
    Undefined:
        Nowhere; never above the whole reverse KL, and 0 with its gradient at equality. The sum over the top alone,
        without the entry for the rest, has a gradient there: it pushes the student's mass out of its top.
    """

    def __init__(
        self, candidates: int = 32, temperature: Temperature = 1.0, scale_by_temperature_squared: bool = True
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
            raise ValueError(f"candidates is {candidates!r}; expected how many ids to read, at least 1.")
        self.candidates = candidates

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], KL(student || teacher) on the student's likeliest ids and the rest."""
        top = student.detach().topk(min(self.candidates, student.shape[-1]), dim=-1).indices
        said, theirs = (
            torch.cat([side.gather(-1, top), side.scatter(-1, top, LOWEST).logsumexp(dim=-1, keepdim=True)], dim=-1)
            for side in (student, teacher)
        )
        return (said.exp() * (said - theirs)).sum(dim=-1)

    def settings(self) -> dict[str, Any]:
        """The number of ids and what every divergence has."""
        return {"candidates": self.candidates, **super().settings()}
