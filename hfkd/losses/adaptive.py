"""Mixtures of the two KL divergences whose shares are decided row by row, from where or how the models disagree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from hfkd.losses.base import Divergence, Temperature
from hfkd.losses.slope import with_slope

_HEAD_RULES = ("official", "crossing")

_FEW = (32, 2048)
"""Among how many entries the head is looked for, first and then; few heads of a language model need the second."""


class AdaptiveKL(Divergence):
    """Punishes in the forward direction where the models disagree on the teacher's likely tokens, in the reverse
    direction where they disagree on the unlikely ones.

    Formula:
        w KL(p || q) + (1 - w) KL(q || p), p the teacher, q the student. With the entries in the order of the teacher's
        probability, the head is the likeliest ones up to a mass of `head_mass`; w is the head's share of
        sum_v |p(v) - q(v)|, taken as a constant.
    Args:
        head_mass: Probability of the head, strictly between 0 and 1.
        head_rule: What becomes of the entry with which the head's mass passes `head_mass`: it is outside (`official`,
            as in the authors' code; the likeliest entry is always inside) or inside (`crossing`).
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        Both distributions. A sparse teacher's tail is one entry like any other. Of equally likely entries those with
        the lower ids come first.
    Cost:
        O(V) per token and nothing is sorted: the head is looked for among the 32 likeliest entries, then among 2048,
        and where it is longer still its end is found by halving, in about 30 passes over that row.
    Undefined:
        Nowhere for finite logits; w is 1/2 where student and teacher are equal. Where w jumps (an entry enters the
        head, or a difference changes its sign) the value may jump with it. Probabilities of exactly 0 count as in
        `forward_kl` and `reverse_kl`.
    Paper:
        Wu et al., 2024, https://arxiv.org/abs/2404.02657. `crossing` is how we read the text, `official` what the
        code does.
    Example:
        >>> import torch
        >>> student = torch.tensor([[0.25, 0.30, 0.20, 0.05, 0.20]]).log()
        >>> teacher = torch.tensor([[0.45, 0.25, 0.15, 0.10, 0.05]]).log()
        >>> round(AdaptiveKL().between(student, teacher).item(), 4)
        0.195
    """

    def __init__(
        self,
        head_mass: float = 0.5,
        head_rule: Literal["official", "crossing"] = "official",
        temperature: Temperature = 1.0,
        scale_by_temperature_squared: bool = True,
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        if not 0 < head_mass < 1:
            raise ValueError(
                f"{self.key}: head_mass is {head_mass}; expected a number strictly between 0 and 1, because the head "
                "and the rest both need some mass. For one direction alone use forward_kl or reverse_kl."
            )
        if head_rule not in _HEAD_RULES:
            raise ValueError(f"{self.key}: head_rule is {head_rule!r}; expected one of {', '.join(_HEAD_RULES)}.")
        self.head_mass, self.head_rule = float(head_mass), head_rule

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], the mixture of both directions."""
        return _mixed_kl(student, teacher, self._share)

    def _share(self, likely: Tensor, believed: Tensor) -> Tensor:
        """[n] the head's share of the difference between two distributions [n, S]."""
        errors = (likely - believed).abs_()
        total, head = errors.sum(dim=-1), errors.new_zeros(len(errors))
        left = torch.arange(len(errors), device=errors.device)
        for few in _FEW:  # most heads are short; the few long ones are looked for once more
            if len(left):
                whole = len(left) == len(errors)
                some, differences = (one if whole else one[left] for one in (likely, errors))
                found, sure = _among_likeliest(some, differences, few, self.head_mass, self.head_rule == "crossing")
                head[left[sure]], left = found[sure], left[~sure]
        if len(left):
            crossing = self.head_rule == "crossing"
            head[left] = _among_all(likely[left], errors[left], self.head_mass, crossing)
        return torch.where(total > 0, head / total, 0.5)

    def settings(self) -> dict[str, Any]:
        """How the head is cut off, and what every divergence has."""
        return {"head_mass": self.head_mass, "head_rule": self.head_rule, **super().settings()}


class BalancedKL(Divergence):
    """Punishes more in the forward direction where the student is too sure of itself, more in the reverse direction
    where it isn't sure enough.

    Formula:
        w KL(p || q) + (1 - w) KL(q || p), w = 1 / (1 + exp(-sharpness (H(p) - H(q)))), taken as a constant; p the
        teacher, q the student, H(.) the entropy in nats.
    Args:
        sharpness: How fast the difference of the entropies decides, > 0, per nat. Near 0 both directions weigh the
            same; a large one takes either the one or the other.
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        Both distributions.
    Cost:
        O(V) per token, about twice a KL.
    Undefined:
        Nowhere for finite logits. Probabilities of exactly 0 count as in `forward_kl` and `reverse_kl`.
    Paper:
        The idea of weighing both directions by the entropies: Amara et al. (BD-KD), 2022,
        https://arxiv.org/abs/2212.12965. The rule with the sigmoid is ours, and the teacher isn't trained along.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> round(BalancedKL().between(student, teacher).item(), 4)
        0.4524
    """

    def __init__(
        self, sharpness: float = 1.0, temperature: Temperature = 1.0, scale_by_temperature_squared: bool = True
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        if not 0 < sharpness < float("inf"):
            raise ValueError(
                f"{self.key}: sharpness is {sharpness}; expected a number above 0 (for fixed shares take the terms "
                "forward_kl and reverse_kl, each with its weight)."
            )
        self.sharpness = float(sharpness)

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], the mixture of both directions."""

        def share(likely: Tensor, believed: Tensor) -> Tensor:
            surplus = (believed * student).sum(dim=-1) - (likely * teacher).sum(dim=-1)
            return torch.sigmoid(self.sharpness * surplus)

        return _mixed_kl(student, teacher, share)

    def settings(self) -> dict[str, Any]:
        """The sharpness and what every divergence has."""
        return {"sharpness": self.sharpness, **super().settings()}


def _mixed_kl(student: Tensor, teacher: Tensor, share: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[n] KL(teacher || student) times the share [n] that both distributions are given, plus KL(student || teacher)
    times the rest; the share has no gradient.
    """
    with torch.no_grad():
        likely, believed = teacher.exp(), student.exp()
        weight = share(likely, believed)
        gap = student - teacher
        forward = -(gap * likely).sum(dim=-1)
        cost = gap.mul_(believed)
        values = weight * forward + (1 - weight) * cost.sum(dim=-1)
        slope = cost.mul_((1 - weight)[:, None]).addcmul_(likely, weight[:, None], value=-1)
    return with_slope(student, values, slope)


def _among_likeliest(
    likely: Tensor, errors: Tensor, few: int, head_mass: float, crossing: bool
) -> tuple[Tensor, Tensor]:
    """[n] the sum of the errors [n, S] over the head of probabilities [n, S], and [n] whether that is sure: the head
    ends among the `few` likeliest entries, and no equally likely entry stands on its other side.
    """
    few = min(few, likely.shape[-1])
    top, places = likely.topk(few, dim=-1)
    mass = top.cumsum(dim=-1)
    if crossing:
        count, ended = (mass < head_mass).sum(dim=-1, keepdim=True) + 1, mass[:, -1] >= head_mass
    else:
        count, ended = (mass <= head_mass).sum(dim=-1, keepdim=True), mass[:, -1] > head_mass
    count = count.clamp(1, few)
    behind = top.gather(-1, count.clamp(max=few - 1)) == top.gather(-1, count - 1)
    sure = ended & torch.where(count < few, ~behind, few == likely.shape[-1])[:, 0]
    inside = torch.arange(few, device=top.device) < count
    return (errors.gather(-1, places) * inside).sum(dim=-1), sure


def _among_all(likely: Tensor, errors: Tensor, head_mass: float, crossing: bool) -> Tensor:
    """What `_among_likeliest` sums, for heads of any length; of equally likely entries the first ones are in the
    head.
    """
    limit, quota = _head_by_halving(likely, head_mass, crossing)
    head = (errors * (likely > limit)).sum(dim=-1)
    tied = (likely == limit).to(errors.dtype)
    tied *= tied.cumsum(dim=-1) <= quota
    return head + tied.mul_(errors).sum(dim=-1)


def _head_by_halving(likely: Tensor, head_mass: float, crossing: bool) -> tuple[Tensor, Tensor]:
    """Where the head of probabilities [n, S] ends: the largest probability such that all entries from there on are
    more than the head (for `crossing`: enough for it), found by halving the range of floating point numbers.

    Returns:
        [n, 1] the probability above which an entry belongs to it, and [n, 1] how many entries of just that probability
        do.
    """
    # Numbers above 0 are in the order of their bits.
    bits = torch.int32 if likely.dtype == torch.float32 else torch.int64
    high = likely.amax(dim=-1, keepdim=True).view(bits) + 1
    # All that is less likely than this is too little to matter.
    low = torch.full_like(likely[:, :1], (1 - head_mass) / (2 * likely.shape[-1])).view(bits)
    kept = torch.empty_like(likely)
    for _ in range(int((high - low).max()).bit_length()):
        middle = low + (high - low) // 2
        torch.ge(likely, middle.view(likely.dtype), out=kept)
        mass = kept.mul_(likely).sum(dim=-1, keepdim=True)
        enough = mass >= head_mass if crossing else mass > head_mass
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    limit = low.view(likely.dtype)
    above = torch.gt(likely, limit, out=kept).mul_(likely).sum(dim=-1, keepdim=True)
    missing = (head_mass - above) / limit
    quota = missing.ceil().clamp(min=1) if crossing else missing.floor().clamp(min=0)
    return limit, torch.where(above > 0, quota, quota.clamp(min=1))
