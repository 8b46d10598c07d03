"""KL divergence on the part of the teacher's distribution that lies between two quantiles of its mass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfkd.losses.base import Divergence, Temperature
from hfkd.support import TokenChunk

_FEATURES = 16
"""Likeliest entries whose log-probabilities the quantiles are learned from, on each side."""

_LOWEST_FEATURE = -20.0

_WIDTH = 32

_MARGIN = 0.04
"""How far from 0 and from 1 the learned quantiles begin."""


class ClippedKL(Divergence):
    """Punishes a student that doesn't cover what the teacher finds neither too likely nor too unlikely, and the text's
    own token.

    Formula:
        KL(p~ || q~), p~ = m p / sum(m p), q~ = m q / sum(m q), p the teacher, q the student, on the `support` ids that
        are likeliest to the teacher, in their order, and the rest as a last entry. c is the mass before an entry and
        half its own; its share m = clamp((c - lower) / softness + 1, 0, 1) clamp((upper - c) / softness + 1, 0, 1),
        but 1 for the target. Where sum(m p) is below `minimum_mass`, every m is raised by the same part of 1 - m, as
        much as is missing.
    Args:
        quantiles: The pair (lower, upper), 0 <= lower < upper <= 1; None learns them: a small network, trained along,
            reads them off the log-probabilities of both models and begins with (0.04, 0.96) for all tokens.
        support: Ids that are told apart, >= 2.
        softness: Mass over which an entry beyond a quantile fades out, > 0.
        minimum_mass: Teacher's mass that is always kept, strictly between 0 and 1. Learned quantiles lie that far
            apart: without it the divergence would be smallest where next to nothing is kept.
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        Both distributions and the target ids. The log has the teacher's mass that was kept as `kept_mass`.
    Cost:
        O(V) per token, to find the likeliest ids and the rest of the mass.
    Undefined:
        Nowhere for finite logits. With quantiles (0, 1) it is `forward_kl` on the same entries.
    Paper:
        Liu et al. (MGSR, DAC-KL), 2024, https://arxiv.org/abs/2407.10068. There is no official code: quantiles of the
        sorted mass, soft edges and the bound on what is kept are ours.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.7, 0.2, 0.1]]).log()
        >>> round(ClippedKL(quantiles=(0.0, 0.8)).between(student, teacher).item(), 4)
        0.0538
    """

    may_stand_alone = False
    why_not_alone = "it charges nothing for what the student gives to the entries that are cut off."

    def __init__(
        self,
        quantiles: Sequence[float] | None = None,
        support: int = 256,
        softness: float = 0.05,
        minimum_mass: float = 0.5,
        temperature: Temperature = 1.0,
        scale_by_temperature_squared: bool = True,
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        if not support >= 2 or not 0 < softness < math.inf:
            raise ValueError(
                f"{self.key}: got support {support}, softness {softness}; expected at least 2 ids and a softness "
                "above 0 (0.01 makes hard edges)."
            )
        if not 0 < minimum_mass < 1:
            raise ValueError(
                f"{self.key}: minimum_mass is {minimum_mass}; expected a number strictly between 0 and 1 (to keep "
                "everything use forward_kl)."
            )
        if quantiles is not None and (len(quantiles) != 2 or not 0 <= quantiles[0] < quantiles[1] <= 1):
            raise ValueError(
                f"{self.key}: quantiles are {quantiles!r}; expected a pair 0 <= lower < upper <= 1, or null to have "
                "them learned."
            )
        self.quantiles = None if quantiles is None else tuple(float(one) for one in quantiles)
        self.support, self.softness, self.minimum_mass = int(support), float(softness), float(minimum_mass)
        self.network = self._make_network() if quantiles is None else None
        self._prepared = False

    def prepare(self, width: int, vocab_size: int) -> None:
        """Draw the network anew by the seed of the run; once."""
        if self.network is not None and not self._prepared:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(torch.initial_seed())
                self.network = self._make_network()
            self._prepared = True

    def compare(self, chunk: TokenChunk) -> Tensor:
        """Return [n], the divergence of what is kept on the teacher's likeliest ids."""
        pair = chunk.top_log_probs(self.support, self.temperature)
        values, kept = self._clipped(*pair, chunk.top_places(self.support))
        chunk.measure("kept_mass", kept)
        return values

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], the divergence of what is kept of all entries; no target is singled out."""
        order = teacher.argsort(dim=-1, descending=True, stable=True)
        return self._clipped(student.gather(-1, order), teacher.gather(-1, order), None)[0]

    def _clipped(self, student: Tensor, teacher: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """[n] the divergence and [n] the teacher's mass that is kept, of entries in the teacher's order."""
        likely = teacher.exp()
        lower, upper = self._bounds(student.detach(), teacher)
        middle = likely.cumsum(dim=-1) - likely / 2
        share = ((middle - lower) / self.softness + 1).clamp(0, 1) * ((upper - middle) / self.softness + 1).clamp(0, 1)
        if places is not None:
            share = share.scatter(-1, places[:, None], 1.0)
        kept = (share * likely).sum(dim=-1, keepdim=True)
        # Where enough is kept, the divisor doesn't matter: it is only held away from 0.
        lift = ((self.minimum_mass - kept) / (1 - kept).clamp(min=1 - self.minimum_mass)).clamp(min=0)
        share = share + (1 - share) * lift
        held = share * likely
        kept = held.sum(dim=-1)
        # Relative to the largest entry that is kept, because all that the student gives to these may have underflown.
        largest = student.detach().masked_fill(share.detach() == 0, -math.inf).amax(dim=-1, keepdim=True)
        rest = (share * (student - largest).clamp(max=0).exp()).sum(dim=-1).log() + largest[:, 0]
        return (held * (teacher - student)).sum(dim=-1) / kept - kept.log() + rest, kept

    def _bounds(self, student: Tensor, teacher: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The two quantiles, [n, 1] each where they are learned."""
        if self.network is None:
            return self.quantiles
        pair = [one[:, :_FEATURES].clamp(min=_LOWEST_FEATURE) for one in (teacher, student)]
        missing = _FEATURES - pair[0].shape[-1]
        features = torch.cat([nn.functional.pad(one, (0, missing), value=_LOWEST_FEATURE) for one in pair], dim=-1)
        with torch.autocast(features.device.type, enabled=False):
            said = self.network(features.to(self.network[0].weight.dtype)).to(teacher.dtype).sigmoid()
        lower = (1 - self.minimum_mass) * said[:, :1]
        upper = lower + self.minimum_mass + (1 - self.minimum_mass - lower) * said[:, 1:]
        return lower, upper

    def _make_network(self) -> nn.Sequential:
        last = nn.Linear(_WIDTH, 2)
        free = 1 - self.minimum_mass
        margin = min(_MARGIN, free / 4)
        first = torch.tensor([margin / free, (free - 2 * margin) / (free - margin)])
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.logit(first))
        return nn.Sequential(nn.Linear(2 * _FEATURES, _WIDTH), nn.GELU(), last)

    def settings(self) -> dict[str, Any]:
        """What is kept, and what every divergence has."""
        quantiles = None if self.quantiles is None else list(self.quantiles)
        names = ("support", "softness", "minimum_mass")
        return {"quantiles": quantiles, **{name: getattr(self, name) for name in names}, **super().settings()}
