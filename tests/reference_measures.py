"""What the losses beside the plain divergences ought to be, from their definitions: float64, plain probabilities.

The other half of `reference.py`, whose rules and conventions hold here too: written without looking at `hfkd/losses`,
student before teacher, q the student's distribution and p the teacher's, results `[N]`, everything differentiable.
Where a method takes a weight out of the graph, so does the definition here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Softmax of `logits / temperature` in float64, `[N, V]`; a logit of -inf is a probability of exactly 0."""
    return torch.softmax(logits.double() / temperature, dim=-1)


def weighted_log(weight: Tensor, value: Tensor) -> Tensor:
    """Weight times log value, entry by entry, with 0 log 0 = 0."""
    present = weight > 0
    return torch.where(present, weight * torch.log(torch.where(present, value, torch.ones_like(value))), 0.0)


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of probabilities `[N, V]` in nats, `[N]`, with 0 log 0 = 0; infinite where it is."""
    return (weighted_log(first, first) - weighted_log(first, second)).sum(-1)


def scaled(value: Tensor, temperature: float, scale: bool) -> Tensor:
    """Times temperature ** 2, if that is asked for."""
    return value * temperature**2 if scale else value


# ------------------------------------------------------------------- forward and reverse KL, weighed per token


def adaptive_kl(
    student_logits,
    teacher_logits,
    targets=None,
    head_mass=0.5,
    head_rule="official",
    temperature=1.0,
    scale_by_temperature_squared=True,
) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p), w the share of |p - q| that lies on the teacher's head; w has no gradient."""
    p, q = probabilities(teacher_logits, temperature), probabilities(student_logits, temperature)
    sorted_p, order = torch.sort(p, dim=-1, descending=True, stable=True)
    mass = sorted_p.cumsum(-1)
    head = mass <= head_mass if head_rule == "official" else mass - sorted_p < head_mass
    head[:, 0] = True
    gap = (sorted_p - q.gather(-1, order)).abs()
    total = gap.sum(-1)
    share = torch.where(total > 0, (gap * head).sum(-1) / total.clamp(min=1e-300), 0.5).detach()
    return scaled(share * kl(p, q) + (1 - share) * kl(q, p), temperature, scale_by_temperature_squared)


def balanced_kl(
    student_logits, teacher_logits, targets=None, sharpness=1.0, temperature=1.0, scale_by_temperature_squared=True
) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p), w = sigmoid(sharpness (H(p) - H(q))) without a gradient."""
    p, q = probabilities(teacher_logits, temperature), probabilities(student_logits, temperature)
    entropies = [-weighted_log(x, x).sum(-1) for x in (p, q)]
    weight = torch.sigmoid(sharpness * (entropies[0] - entropies[1])).detach()
    return scaled(weight * kl(p, q) + (1 - weight) * kl(q, p), temperature, scale_by_temperature_squared)


# ---------------------------------------------------------------------------------- other measures of p and q


def alpha_beta(
    student_logits,
    teacher_logits,
    targets=None,
    teacher_power=0.2,
    student_power=0.7,
    temperature=1.0,
    scale_by_temperature_squared=True,
) -> Tensor:
    """The alpha-beta divergence with p to the power `a` and q to the power `b`, and its limits at a = 0 and b = 0."""
    p, q = probabilities(teacher_logits, temperature), probabilities(student_logits, temperature)
    a, b = teacher_power, student_power
    if b == 0:
        logs = a * p**a * (_safe_log(p) - _log_where(p, q))
        value = (q**a - p**a + logs).sum(-1) / a**2
    elif a == 0:
        logs = b * q**b * (_safe_log(q) - _log_where(q, p))
        value = (p**b - q**b + logs).sum(-1) / b**2
    else:
        inner = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
        value = -inner.sum(-1) / (a * b)
    return scaled(value, temperature, scale_by_temperature_squared)


def _safe_log(values: Tensor) -> Tensor:
    return _log_where(values, values)


def _log_where(present: Tensor, values: Tensor) -> Tensor:
    return torch.log(torch.where(present > 0, values, torch.ones_like(values)))


def normalized_kd(
    student_logits,
    teacher_logits,
    targets,
    non_target_weight=1.5,
    temperature=1.0,
    scale_by_temperature_squared=True,
) -> Tensor:
    """-p(y) log q(y) at temperature 1, and the cross-entropy of the two softmaxes over all ids but y."""
    is_target = torch.nn.functional.one_hot(targets, student_logits.shape[-1]).bool()
    p, q = probabilities(teacher_logits), probabilities(student_logits)
    on_target = -weighted_log(p, q)[is_target]
    p_rest = probabilities(teacher_logits.double().masked_fill(is_target, -math.inf), temperature)
    q_rest = probabilities(student_logits.double().masked_fill(is_target, -math.inf), temperature)
    elsewhere = -weighted_log(p_rest, q_rest).sum(-1)
    return on_target + non_target_weight * scaled(elsewhere, temperature, scale_by_temperature_squared)


def adaptive_label_smoothing(
    student_logits, teacher_logits, targets, cap=0.9, temperature=1.0, scale_by_temperature_squared=True
) -> Tensor:
    """Cross-entropy of q to (1 - a) onehot + a p, less the target's entropy; a = 1 - H(q) / log S, at most `cap`.

    Neither a nor the target has a gradient. One entry alone has no entropy and is all there is: 0.
    """
    p, q = probabilities(teacher_logits, temperature), probabilities(student_logits, temperature)
    entries = q.shape[-1]
    entropy = -weighted_log(q, q).sum(-1)
    share = (1.0 - entropy / math.log(entries)).clamp(0.0, cap) if entries > 1 else torch.zeros_like(entropy)
    onehot = torch.nn.functional.one_hot(targets, entries).double()
    mixed = ((1.0 - share).unsqueeze(-1) * onehot + share.unsqueeze(-1) * p).detach()
    value = -weighted_log(mixed, q).sum(-1) + weighted_log(mixed, mixed).sum(-1)
    return scaled(value, temperature, scale_by_temperature_squared)


def clipped_kl(
    student_logits,
    teacher_logits,
    targets,
    support=256,
    quantiles=(0.04, 0.96),
    softness=0.05,
    minimum_mass=0.5,
    temperature=1.0,
    scale_by_temperature_squared=True,
    tail=False,
) -> Tensor:
    """KL of p and q, both weighed entry by entry by how well its place in p's mass lies between two quantiles.

    The default quantiles are where the learned ones begin. With `tail`, the last column is no id but all that is left.
    """
    p, q = probabilities(teacher_logits, temperature), probabilities(student_logits, temperature)
    ids = p.shape[-1] - tail
    order = torch.sort(p[:, :ids], dim=-1, descending=True, stable=True).indices[:, :support]
    column = (order == targets[:, None]).long()
    place = torch.where(column.any(-1), column.argmax(-1), order.shape[-1])
    p, q = (_kept_and_rest(x, order) for x in (p, q))
    middle = p.cumsum(-1) - p / 2
    above = ((middle - quantiles[0]) / softness + 1).clamp(0, 1)
    below = ((quantiles[1] - middle) / softness + 1).clamp(0, 1)
    weight = (above * below).scatter(-1, place[:, None], 1.0)
    kept = (weight * p).sum(-1, keepdim=True)
    missing = ((minimum_mass - kept) / (1 - kept).clamp(min=1e-300)).clamp(min=0)
    weight = weight + (1 - weight) * missing
    p, q = (weight * x / (weight * x).sum(-1, keepdim=True) for x in (p, q))
    return scaled(kl(p, q), temperature, scale_by_temperature_squared)


def _kept_and_rest(values: Tensor, order: Tensor) -> Tensor:
    """The entries named by `order`, and one more for all others, if there are others."""
    kept = values.gather(-1, order)
    if order.shape[-1] == values.shape[-1]:
        return kept
    return torch.cat([kept, values.scatter(-1, order, 0.0).sum(-1, keepdim=True)], -1)


# -------------------------------------------------------------------------------------- measures of the logits


def logit_binary_kl(
    student_logits, teacher_logits, targets=None, support=128, temperature=2.0, scale_by_temperature_squared=True
) -> Tensor:
    """The sum over the teacher's likeliest ids of KL(Bernoulli(1/2) || Bernoulli(sigmoid((s - t) / T)))."""
    order = teacher_logits.topk(min(support, teacher_logits.shape[-1]), -1).indices
    s, t = (x.double().gather(-1, order) for x in (student_logits, teacher_logits))
    x = ((s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))) / temperature
    yes, no = torch.nn.functional.logsigmoid(x), torch.nn.functional.logsigmoid(-x)
    half = math.log(0.5)
    value = (0.5 * (half - yes) + 0.5 * (half - no)).sum(-1)
    return scaled(value, temperature, scale_by_temperature_squared)


def logit_mse(
    student_logits, teacher_logits, targets=None, centre=True, temperature=1.0, scale_by_temperature_squared=True
) -> Tensor:
    """The mean over the vocabulary of the squared difference of the logits, each row shifted to a mean of 0."""
    s, t = (x.double() / temperature for x in (student_logits, teacher_logits))
    if centre:
        s, t = s - s.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
    return scaled(((s - t) ** 2).mean(-1), temperature, scale_by_temperature_squared)


def standardized_kl(
    student_logits, teacher_logits, targets=None, temperature=2.0, scale_by_temperature_squared=True
) -> Tensor:
    """KL(p || q) of the softmaxes of logits that have a mean of 0 and a (population) standard deviation of 1."""

    def standard(logits: Tensor) -> Tensor:
        centred = logits.double() - logits.double().mean(-1, keepdim=True)
        return centred / ((centred**2).mean(-1, keepdim=True).sqrt() + 1e-7)

    p, q = probabilities(standard(teacher_logits), temperature), probabilities(standard(student_logits), temperature)
    return scaled(kl(p, q), temperature, scale_by_temperature_squared)


def _margins(student_logits: Tensor, teacher_logits: Tensor, top: int, temperature: float) -> tuple[Tensor, Tensor]:
    """By how much the student prefers what the teacher prefers, `[N, pairs]`, and which pairs the teacher orders."""
    best, order = teacher_logits.double().topk(min(top, teacher_logits.shape[-1]), -1)
    s = student_logits.double().gather(-1, order) / temperature
    pairs = list(itertools.combinations(range(order.shape[-1]), 2))
    margins = torch.stack([s[:, i] - s[:, j] for i, j in pairs], -1)
    ordered = torch.stack([best[:, i] != best[:, j] for i, j in pairs], -1)
    return margins, ordered


def hinge_ranking(
    student_logits,
    teacher_logits,
    targets=None,
    top=8,
    margin=1.0,
    temperature=1.0,
    scale_by_temperature_squared=True,
) -> Tensor:
    """The mean over pairs of the teacher's likeliest ids of max(0, margin - what the student prefers the first by)."""
    margins, ordered = _margins(student_logits, teacher_logits, top, temperature)
    value = (torch.relu(margin - margins) * ordered).mean(-1)
    return scaled(value, temperature, scale_by_temperature_squared)


def logistic_ranking(
    student_logits, teacher_logits, targets=None, top=8, temperature=1.0, scale_by_temperature_squared=True
) -> Tensor:
    """The mean over the same pairs of log(1 + exp(-what the student prefers the first by))."""
    margins, ordered = _margins(student_logits, teacher_logits, top, temperature)
    value = (torch.nn.functional.softplus(-margins) * ordered).mean(-1)
    return scaled(value, temperature, scale_by_temperature_squared)


# -------------------------------------------------------------------------------------------- neighbouring rows


def span_correlation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
) -> Tensor:
    """|p_i p_{i+1} - q_i q_{i+1}|^2 of neighbours in a span, said of the second; one span of all rows by default."""
    p, q = probabilities(teacher_logits, temperature), probabilities(student_logits, temperature)
    value = torch.zeros(len(q), dtype=torch.float64)
    for span in groups if groups is not None else [range(len(q))]:
        for before, row in itertools.pairwise(span):
            cost = ((p[before] * p[row] - q[before] * q[row]) ** 2).sum()
            value = value.index_add(0, torch.tensor([row]), cost[None])
    return scaled(scale * value, temperature, scale_by_temperature_squared)


# ------------------------------------------------------------------------------------ other vocabularies, other tokens


def uld(
    student_logits,
    teacher_logits,
    targets=None,
    top=None,
    temperature=1.0,
    scale_by_temperature_squared=True,
) -> Tensor:
    """The sum of |p_(i) - q_(i)| over sorted probabilities, zeros behind the shorter; `top` of them and the rest."""
    sides = []
    for logits in (teacher_logits, student_logits):
        ranked = torch.sort(probabilities(logits, temperature), dim=-1, descending=True, stable=True).values
        if top is not None and top < ranked.shape[-1]:
            ranked = torch.cat([ranked[:, :top], ranked[:, top:].sum(-1, keepdim=True)], -1)
        elif top is not None:
            ranked = torch.nn.functional.pad(ranked, (0, top + 1 - ranked.shape[-1]))
        sides.append(ranked)
    size = max(side.shape[-1] for side in sides)
    p, q = (torch.nn.functional.pad(side, (0, size - side.shape[-1])) for side in sides)
    return scaled((p - q).abs().sum(-1), temperature, scale_by_temperature_squared)


def span_likelihood(student_logits, teacher_logits, targets, power=1.0) -> Tensor:
    """KL(P || Q) of two coins: P = p(target)^power and Q = q(target)^power. Every token is a span."""
    return coins(*(yes_and_no(logits, targets, power) for logits in (teacher_logits, student_logits)))


def coins(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """KL of two coins, each given as the probabilities of its sides."""
    return kl(torch.stack(first, -1), torch.stack(second, -1))


def yes_and_no(logits: Tensor, targets: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """P^power and 1 - P^power, P the probability of the target; what remains of 1 is a sum, not a difference."""
    is_target = torch.nn.functional.one_hot(targets, logits.shape[-1]).bool()
    chosen = probabilities(logits)[is_target]
    others = (probabilities(logits) * ~is_target).sum(-1)
    sure = chosen > 0.5
    small = -torch.expm1(power * torch.log1p(-torch.where(sure, others, 0.5)))
    return chosen**power, torch.where(sure, small, 1 - torch.where(sure, 0.5, chosen) ** power)
