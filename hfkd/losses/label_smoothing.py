"""Targets between the text and a teacher, mixed token by token by how sure the student is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hfkd.losses.base import Divergence, Temperature
from hfkd.losses.slope import with_slope
from hfkd.support import TokenChunk


class AdaptiveLabelSmoothing(Divergence):
    """Punishes a student that misses the text's token, and one that is sure of itself otherwise than the teacher is.

    Formula:
        KL(m || q), m = (1 - a) e + a p, a = min(cap, 1 - H(q) / log S), e the text's token, q the student, p the
        teacher, H the entropy, S the number of entries. m is taken out of the graph.
    Args:
        cap: The most that the teacher's share a may be, between 0 and 1. With a large vocabulary nearly every trained
            token has a share above 0.8; at 1 a student that is sure would not hear of the text at all.
        temperature: Divides both models' logits, > 0; the text's token is fitted at it too.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        Both distributions and the target ids. Where a sparse teacher doesn't list the target, e is its tail.
    Cost:
        O(V) per token, about one and a half times a KL.
    Undefined:
        Nowhere. The cross-entropy to m less m's own entropy, which changes no gradient: so it is 0 where q = m, but
        not 0 at equality with the teacher. With one entry alone there is nothing to spread, and it is 0.
    Paper:
        Lee, Cheung and Zhang, 2022, https://arxiv.org/abs/2210.13459, with an earlier self as the teacher; `cap` is
        ours.
    Example:
        >>> import torch
        >>> from hfkd.support import TokenChunk
        >>> student, teacher = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).log(), torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
        >>> chunk = TokenChunk.from_logits(torch.tensor([0]), student, teacher)
        >>> round(AdaptiveLabelSmoothing()(chunk).item(), 4), round(chunk.measures["smoothing"].item(), 6)
        (0.0465, 0.32161)
    """

    fits_text = True

    def __init__(
        self, cap: float = 0.9, temperature: Temperature = 1.0, scale_by_temperature_squared: bool = True
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        if not 0 <= cap <= 1:
            raise ValueError(
                f"{self.key}: cap is {cap}; expected a number from 0 (the text alone) to 1 (as far as the student is "
                "sure)."
            )
        self.cap = float(cap)

    def compare(self, chunk: TokenChunk) -> Tensor:
        """Return [n], KL(mixture || student)."""
        student, teacher = chunk.log_probs(self.temperature)
        with torch.no_grad():
            share = self.smoothing(student)
            mixture = teacher.exp().mul_(share[:, None])
            mixture.scatter_add_(-1, chunk.target_places()[:, None], (1 - share)[:, None])
            known = mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log_()
            values = known.sub_(student).mul_(mixture).sum(dim=-1)
        chunk.measure("smoothing", share)
        return with_slope(student, values, mixture.neg_())

    def smoothing(self, student: Tensor) -> Tensor:
        """The teacher's share of each target.

        Args:
            student: [n, S] log-probabilities.

        Returns:
            [n] between 0 (all entries alike) and the cap (sure of one).
        """
        entropy = -(student.exp() * student).sum(dim=-1)
        return (1 - entropy / math.log(max(2, student.shape[-1]))).clamp(min=0.0, max=self.cap)

    def settings(self) -> dict[str, Any]:
        """The cap and what every divergence has."""
        return {"cap": self.cap, **super().settings()}
