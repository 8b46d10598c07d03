"""What every loss ought to be, from its definition: float64, plain probabilities, no chunks, no shared tricks.

Written without looking at `hfkd/losses` and `hfkd/objective.py`, and to be kept that way: a reference that copies the
implementation agrees with its mistakes. Everything here is differentiable, so the same lines give the reference
gradients. Probabilities are formed plainly (no log-sum-exp of mixtures): float64 carries logit gaps up to about 700.

It knows nothing of models, padding, chunk sizes or dtypes below float64. Conventions: student before teacher; q is the
student's distribution and p the teacher's; results are nats per token, shape `[N]`; rows are supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from reference_measures import (
    adaptive_kl,
    adaptive_label_smoothing,
    alpha_beta,
    balanced_kl,
    clipped_kl,
    hinge_ranking,
    kl,
    logistic_ranking,
    logit_binary_kl,
    logit_mse,
    normalized_kd,
    probabilities,
    scaled,
    span_correlation,
    span_likelihood,
    standardized_kl,
    uld,
)
from torch import Tensor


def cross_entropy(student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
    """-log q(target); reads no teacher and has no temperature."""
    chosen = probabilities(student_logits).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return -torch.log(chosen)


def embedding_neighbours(student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
    """Without a head to find neighbours in it is cross-entropy; tests/test_neighbours.py has the rest."""
    return cross_entropy(student_logits, teacher_logits, targets)


def forward_kl(
    student_logits, teacher_logits, targets=None, temperature=1.0, scale_by_temperature_squared=True
) -> Tensor:
    """KL(p || q), teacher first."""
    p, q = probabilities(teacher_logits, temperature), probabilities(student_logits, temperature)
    return scaled(kl(p, q), temperature, scale_by_temperature_squared)


def reverse_kl(
    student_logits, teacher_logits, targets=None, temperature=1.0, scale_by_temperature_squared=True
) -> Tensor:
    """KL(q || p), student first."""
    p, q = probabilities(teacher_logits, temperature), probabilities(student_logits, temperature)
    return scaled(kl(q, p), temperature, scale_by_temperature_squared)


def jensen_shannon(
    student_logits,
    teacher_logits,
    targets=None,
    mixture_weight=0.5,
    temperature=1.0,
    scale_by_temperature_squared=True,
) -> Tensor:
    """w KL(q || M) + (1 - w) KL(p || M) with M = w q + (1 - w) p."""
    p, q = probabilities(teacher_logits, temperature), probabilities(student_logits, temperature)
    mixture = mixture_weight * q + (1.0 - mixture_weight) * p
    value = mixture_weight * kl(q, mixture) + (1.0 - mixture_weight) * kl(p, mixture)
    return scaled(value, temperature, scale_by_temperature_squared)


def skew_forward_kl(
    student_logits, teacher_logits, targets=None, skew=0.1, temperature=1.0, scale_by_temperature_squared=True
) -> Tensor:
    """KL(p || skew p + (1 - skew) q)."""
    p, q = probabilities(teacher_logits, temperature), probabilities(student_logits, temperature)
    return scaled(kl(p, skew * p + (1.0 - skew) * q), temperature, scale_by_temperature_squared)


def skew_reverse_kl(
    student_logits, teacher_logits, targets=None, skew=0.1, temperature=1.0, scale_by_temperature_squared=True
) -> Tensor:
    """KL(q || (1 - skew) p + skew q)."""
    p, q = probabilities(teacher_logits, temperature), probabilities(student_logits, temperature)
    return scaled(kl(q, (1.0 - skew) * p + skew * q), temperature, scale_by_temperature_squared)


def total_variation(
    student_logits, teacher_logits, targets=None, temperature=1.0, scale_by_temperature_squared=True
) -> Tensor:
    """Half of the L1 distance between p and q."""
    p, q = probabilities(teacher_logits, temperature), probabilities(student_logits, temperature)
    return scaled(0.5 * (p - q).abs().sum(-1), temperature, scale_by_temperature_squared)


# ------------------------------------------------------------------------------------------- transport


def l1_cost(first: Tensor, second: Tensor) -> Tensor:
    """C_ij = sum over v of |first_iv - second_jv|, `[n, m]`, each between 0 and 2."""
    return (first.unsqueeze(1) - second.unsqueeze(0)).abs().sum(-1)


def transport_plan(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Sinkhorn in the log domain: rows first, columns last, so each column sums to 1 and the mass is n. `[n, n]`."""
    kernel = -cost / epsilon
    g = torch.zeros(cost.shape[1], dtype=cost.dtype)
    f = torch.zeros(cost.shape[0], dtype=cost.dtype)
    for _ in range(iterations):
        f = -torch.logsumexp(kernel + g.unsqueeze(0), dim=1)
        g = -torch.logsumexp(kernel + f.unsqueeze(1), dim=0)
    return torch.exp(f.unsqueeze(1) + g.unsqueeze(0) + kernel)


def l1_cost_on_likeliest(first: Tensor, second: Tensor, support: int) -> Tensor:
    """The same over the union of both rows' `support` likeliest entries, and one entry for the rest of each row."""
    ours, theirs = (
        torch.zeros_like(side, dtype=torch.bool).scatter(-1, side.topk(min(support, side.shape[-1]), -1).indices, True)
        for side in (first, second)
    )
    listed = ours.unsqueeze(1) | theirs.unsqueeze(0)
    gap = first.unsqueeze(1) - second.unsqueeze(0)
    return (gap.abs() * listed).sum(-1) + (gap * ~listed).sum(-1).abs()


def transport_rows(
    first: Tensor,
    second: Tensor,
    epsilon: float,
    iterations: int,
    detach_plan: bool = False,
    support: int | None = None,
    pair_weight: float = 0.0,
) -> Tensor:
    """Row i's share of one group's cost, sum over j of plan_ij C_ij; the shares sum to <plan, C>. `[n]`.

    The published 2 x 2 case, 1.229573, is this *sum* over the two rows (0.6147865 a row), not a mean.
    """
    cost = l1_cost(first, second) if support is None else l1_cost_on_likeliest(first, second, support)
    plan = transport_plan(cost.detach() if detach_plan else cost, epsilon, iterations)
    return (plan * cost).sum(-1) + pair_weight * cost.diagonal()


def sinkhorn(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    epsilon: float = 0.1,
    iterations: int = 20,
    debias: bool = False,
    detach_plan: bool = False,
    support: int | None = None,
    pair_weight: float = 0.0,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
) -> Tensor:
    """Entropic transport between the student's and the teacher's rows of each group; one group of all rows by default.

    With `debias`, S = W(Q, P) - W(Q, Q) / 2 - W(P, P) / 2, each W split over its rows in the same way.
    """
    p, q = probabilities(teacher_logits, temperature), probabilities(student_logits, temperature)
    rows = len(q)
    value = torch.zeros(rows, dtype=torch.float64)
    for group in groups if groups is not None else [range(rows)]:
        index = torch.tensor(list(group), dtype=torch.long)
        if len(index) == 0:
            continue
        share = transport_rows(q[index], p[index], epsilon, iterations, detach_plan, support, pair_weight)
        if debias:
            for side in (q[index], p[index]):
                share = share - 0.5 * transport_rows(side, side, epsilon, iterations, detach_plan, support)
        value = value.index_add(0, index, share)
    return scaled(value, temperature, scale_by_temperature_squared)


def swing(
    student_logits,
    teacher_logits,
    targets=None,
    measure="forward_kl",
    private=None,
    max_temperature=10.0,
    noise="none",
    noise_share=0.1,
    student_too=False,
    temperature=1.0,
    scale_by_temperature_squared=True,
) -> Tensor:
    """The measure between q and the teacher at temperature h = T + (max_temperature - T) s, mixed with uniform noise;
    random noise has no definition but its mean.
    """
    s = torch.zeros(len(student_logits), dtype=torch.float64) if private is None else private.double()
    h = (temperature + (max_temperature - temperature) * s)[:, None]
    p = torch.softmax(teacher_logits.double() / h, -1)
    if noise != "none":
        mixed = noise_share * s[:, None]
        p = torch.where(mixed > 0, (1 - mixed) * p + mixed / p.shape[-1], p)
    q = torch.softmax(student_logits.double() / (h if student_too else temperature), -1)
    value = REFERENCES[measure](q.log(), p.log(), targets)
    return value * (temperature**2 * (1 - s) + s) if scale_by_temperature_squared else value


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "sinkhorn": sinkhorn,
    "adaptive_kl": adaptive_kl,
    "balanced_kl": balanced_kl,
    "alpha_beta": alpha_beta,
    "normalized_kd": normalized_kd,
    "adaptive_label_smoothing": adaptive_label_smoothing,
    "embedding_neighbours": embedding_neighbours,
    "clipped_kl": clipped_kl,
    "logit_binary_kl": logit_binary_kl,
    "logit_mse": logit_mse,
    "standardized_kl": standardized_kl,
    "hinge_ranking": hinge_ranking,
    "logistic_ranking": logistic_ranking,
    "span_correlation": span_correlation,
    "uld": uld,
    "span_likelihood": span_likelihood,
    "swing": swing,
}


# --------------------------------------------------------------------------------- the whole objective


@dataclass
class DenseResult:
    """The dense objective and its exact gradients, all float64; `bias` and `weight` are None where there is none."""

    total: Tensor
    parts: list[float]
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass
class DenseTerm:
    """One weighted term: `weight` x sum over tokens of `kind(student, teacher, targets, **arguments)`."""

    kind: str
    weight: float = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)


def rounded_to(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What a model of this dtype makes of `values`: rounded, still float64, with the gradient of the identity."""
    return values if dtype is None else values + (values.to(dtype).double() - values).detach()


def project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float = 1.0,
    soft_cap: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Logits `[N, V]` of hidden rows `[N, H]`: linear head, then a scale, then cap * tanh(logits / cap).

    With a `dtype`, logits are rounded as a model of that dtype rounds them. A distance whose gradient jumps (|p - q|)
    can't be compared otherwise.
    """
    logits = rounded_to(hidden @ weight.T, dtype)
    if bias is not None:
        logits = rounded_to(logits + bias, dtype)
    logits = logits * scale
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def dense_objective(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_logits: Tensor | None,
    targets: Tensor,
    terms: Sequence[DenseTerm],
    token_weights: Tensor | None = None,
    scale: float = 1.0,
    soft_cap: float | None = None,
    dtype: torch.dtype | None = None,
) -> DenseResult:
    """The sum over tokens and terms with every row projected at once, and its gradients by float64 autograd.

    Args:
        hidden: `[N, H]`. weight: `[V, H]`. bias: `[V]` or None.
        teacher_logits: `[N, V]`, raw (not divided by a temperature).
        targets: `[N]`. terms: What is summed.
        token_weights: `[N]`, multiplies each token's loss; ones by default. The total is a sum, divided by nothing.
        dtype: See `project`.
    """
    hidden = hidden.detach().double().requires_grad_(True)
    weight = weight.detach().double().requires_grad_(True)
    bias = None if bias is None else bias.detach().double().requires_grad_(True)
    teacher = None if teacher_logits is None else teacher_logits.detach().double()
    ones = torch.ones(len(hidden), dtype=torch.float64)
    per_token = ones if token_weights is None else token_weights.detach().double()
    logits = project(hidden, weight, bias, scale, soft_cap, dtype)
    values = [(per_token * REFERENCES[term.kind](logits, teacher, targets, **term.arguments)).sum() for term in terms]
    total = sum(
        (term.weight * value for term, value in zip(terms, values, strict=True)), torch.zeros((), dtype=torch.float64)
    )
    leaves = [hidden, weight] + ([] if bias is None else [bias])
    gradients = torch.autograd.grad(total, leaves)
    return DenseResult(
        total=total.detach(),
        parts=[value.item() for value in values],
        hidden=gradients[0],
        weight=gradients[1],
        bias=gradients[2] if bias is not None else None,
    )
