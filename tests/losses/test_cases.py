"""Cases that one loss must get right, with numbers that a reader can check by hand."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from battery import company, definition
from reference import REFERENCES, l1_cost, transport_plan
from torch import Tensor

from hfkd.losses import LOSSES
from hfkd.objective import build_objective
from hfkd.rows import DenseRows, Head
from hfkd.signal import TeacherSignal
from hfkd.support import TokenChunk

TEACHER = (0.45, 0.25, 0.15, 0.10, 0.05)
STUDENT = (0.25, 0.30, 0.20, 0.05, 0.20)

MIXTURE = tuple(0.25 * q + 0.75 * p for p, q in zip(TEACHER, STUDENT, strict=True))
TEACHER_SKEWED = tuple(0.1 * p + 0.9 * q for p, q in zip(TEACHER, STUDENT, strict=True))
STUDENT_SKEWED = tuple(0.1 * q + 0.9 * p for p, q in zip(TEACHER, STUDENT, strict=True))


def by_hand(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """KL(first || second), written out."""
    return sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))


def entropy(values: tuple[float, ...]) -> float:
    return -sum(p * math.log(p) for p in values)


def standardized(values: tuple[float, ...]) -> tuple[float, ...]:
    """Probabilities of the logits log(values), shifted and stretched to mean 0 and standard deviation 1."""
    logs = [math.log(p) for p in values]
    mean, deviation = statistics.fmean(logs), statistics.pstdev(logs)
    raised = [math.exp((log - mean) / deviation) for log in logs]
    return tuple(value / sum(raised) for value in raised)


SHARE = 1 - entropy(STUDENT) / math.log(5)
SMOOTHED = tuple(SHARE * p + (1 - SHARE) * (place == 4) for place, p in enumerate(TEACHER))
BALANCE = 1 / (1 + math.exp(entropy(STUDENT) - entropy(TEACHER)))
RATIOS = [math.log(q / p) for p, q in zip(TEACHER, STUDENT, strict=True)]
# The teacher's order is the order in which the five are written, so a pair's first is what it prefers.
MARGINS = [math.log(first / second) for first, second in itertools.combinations(STUDENT, 2)]

BY_HAND = [
    # sorted: .45 .25 .15 .10 .05 and .30 .25 .20 .20 .05
    ("uld", {}, 0.30),
    # of the last: .05 ln(.05/.20) + .95 ln(.95/.80) = -.069315 + .163258
    ("span_likelihood", {}, 0.093943),
    # .45 ln(.45/.25) + .25 ln(.25/.30) + .15 ln(.15/.20) + .10 ln(.10/.05) + .05 ln(.05/.20)
    # = .264504 - .045580 - .043152 + .069315 - .069315
    ("forward_kl", {}, 0.175771),
    # nothing is private: the measure itself; what it is at private tokens is below
    ("swing", {}, 0.175771),
    # no head was shown: -ln .20; with one it is below
    ("embedding_neighbours", {}, 1.609438),
    # .25 ln(.25/.45) + .30 ln(.30/.25) + .20 ln(.20/.15) + .05 ln(.05/.10) + .20 ln(.20/.05)
    # = -.146947 + .054696 + .057536 - .034657 + .277259
    ("reverse_kl", {}, 0.207888),
    ("jensen_shannon", {"mixture_weight": 0.25}, 0.25 * by_hand(STUDENT, MIXTURE) + 0.75 * by_hand(TEACHER, MIXTURE)),
    ("skew_forward_kl", {"skew": 0.1}, by_hand(TEACHER, TEACHER_SKEWED)),
    ("skew_reverse_kl", {"skew": 0.1}, by_hand(STUDENT, STUDENT_SKEWED)),
    # (.20 + .05 + .05 + .05 + .15) / 2
    ("total_variation", {}, 0.25),
    # one row each: all of it goes to the only place there is, at an L1 cost of .50
    ("sinkhorn", {"alone": True}, 0.50),
    # -ln .20
    ("cross_entropy", {}, 1.609438),
    # |p - q| is .20 on the first (the head: .45 <= .5 < .70) and .30 on the rest: .4 * .175771 + .6 * .207888
    ("adaptive_kl", {}, 0.195041),
    ("balanced_kl", {}, BALANCE * by_hand(TEACHER, STUDENT) + (1 - BALANCE) * by_hand(STUDENT, TEACHER)),
    # (.04 + .0025 + .0025 + .0025 + .0225) / 2
    ("alpha_beta", {"teacher_power": 1.0, "student_power": 1.0}, 0.035),
    # .05 ln(1 / .20), and 1.5 times the cross-entropy of the other four, which have .95 and .80 together
    (
        "normalized_kd",
        {},
        0.05 * math.log(5)
        - 1.5 * sum(p / 0.95 * math.log(q / 0.80) for p, q in zip(TEACHER[:4], STUDENT[:4], strict=True)),
    ),
    # the share is 1 - 1.501327 / ln 5 = .0672; the rest of the mass lies on the last, which is the text's token
    ("adaptive_label_smoothing", {}, by_hand(SMOOTHED, STUDENT)),
    # the middles of the teacher's mass lie at .225, .575, ...: the first and the target are kept, .45 + .05 of p and
    # .25 + .20 of q: .9 ln(.9 / .5556) + .1 ln(.1 / .4444)
    ("clipped_kl", {"quantiles": [0.0, 0.5], "minimum_mass": 0.4}, 0.285018),
    # (softplus(x) + softplus(-x)) / 2 - ln 2 is ln cosh(x / 2); x is half of log q - log p less its mean
    (
        "logit_binary_kl",
        {},
        4 * sum(math.log(math.cosh((ratio - statistics.fmean(RATIOS)) / 4)) for ratio in RATIOS),
    ),
    ("logit_mse", {}, statistics.pvariance(RATIOS)),
    ("standardized_kl", {"temperature": 1.0}, by_hand(standardized(TEACHER), standardized(STUDENT))),
    ("hinge_ranking", {}, statistics.fmean(max(0.0, 1.0 - margin) for margin in MARGINS)),
    ("logistic_ranking", {}, statistics.fmean(math.log(1 + math.exp(-margin)) for margin in MARGINS)),
]

NEEDS_TWO_ROWS = {"span_correlation"}
"""Pinned by hand in `test_new_cases.py`."""


def rows_of(hidden: Tensor, head: Tensor, **more) -> DenseRows:
    return DenseRows(hidden, Head(head, **more))


# ------------------------------------------------------------------------------------------- direction


@pytest.mark.parametrize(("kind", "arguments", "expected"), BY_HAND, ids=[case[0] for case in BY_HAND])
def test_direction_is_the_one_in_the_name(kind, arguments, expected):
    """Prevents forward and reverse swapped, in a loss, in the objective or in the reference: all three are pinned."""
    student, teacher = torch.tensor([STUDENT]).log(), torch.tensor([TEACHER]).log()
    target = torch.tensor([4])
    exact = REFERENCES[kind](student.double(), teacher.double(), target, **definition(arguments))
    assert exact.item() == pytest.approx(expected, abs=1e-6)
    loss = LOSSES[kind](**arguments)
    assert loss(TokenChunk.from_logits(target, student, teacher)).item() == pytest.approx(expected, abs=1e-6)
    whole = build_objective([{"kind": kind, **arguments}, *company(kind, arguments)])(
        rows_of(student, torch.eye(5)), TeacherSignal(rows_of(teacher, torch.eye(5))), target
    )
    assert whole.total.item() == pytest.approx(expected, abs=1e-6)


def test_every_loss_is_pinned_by_hand():
    """Prevents a new loss whose direction rests on its own docstring."""
    assert {case[0] for case in BY_HAND} | NEEDS_TWO_ROWS == set(LOSSES)


def test_swing_softens_private_tokens_by_hand():
    """Prevents a temperature that goes the wrong way: a private token's teacher must be flatter, not sharper."""
    logits = [torch.tensor([values, values]).log() for values in (STUDENT, TEACHER)]
    chunk = TokenChunk(torch.tensor([4, 4]), *logits, private=torch.tensor([1.0, 0.5]))
    for place, heat in enumerate((3.0, 2.0)):  # 1 + (3 - 1) s
        raised = [p ** (1 / heat) for p in TEACHER]
        flat = tuple(value / sum(raised) for value in raised)
        found = LOSSES["swing"](max_temperature=3.0)(chunk)[place].item()
        assert found == pytest.approx(by_hand(flat, STUDENT), abs=1e-6)


def test_embedding_neighbours_by_hand():
    """Prevents mass for the farthest tokens, or a text's token that keeps less than its own neighbours."""
    loss = LOSSES["embedding_neighbours"](neighbours=1, spread=1.0, cap=0.9)
    # centred they are already, and of length 1: the nearest of the first is the second, at sqrt(2); the third is at 2
    loss.read_head(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]))
    student = (0.4, 0.3, 0.2, 0.1)
    found = loss(TokenChunk.from_logits(torch.tensor([0]), torch.tensor([student]).log())).item()
    share = math.exp(-math.sqrt(2)) / (1 + math.exp(-math.sqrt(2)))
    expected = [
        by_hand((1 - share, share), (0.4, near)) for near in (0.3, 0.1)
    ]  # the second and the fourth are as near
    assert min(abs(found - one) for one in expected) < 1e-6


def test_forward_kl_is_not_the_cross_entropy_against_the_teacher():
    """Prevents a curve that ends at the teacher's entropy instead of 0, under the name of a KL."""
    entropy = -sum(p * math.log(p) for p in TEACHER)
    soft = -sum(p * math.log(q) for p, q in zip(TEACHER, STUDENT, strict=True))
    student, teacher = torch.tensor([STUDENT]).log(), torch.tensor([TEACHER]).log()
    assert LOSSES["forward_kl"]().between(student, teacher).item() == pytest.approx(soft - entropy, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "arguments", "limit", "factor"),
    [
        ("jensen_shannon", {"mixture_weight": 1e-4}, "reverse_kl", 1e-4),
        ("jensen_shannon", {"mixture_weight": 1 - 1e-4}, "forward_kl", 1e-4),
        ("skew_forward_kl", {"skew": 1e-6}, "forward_kl", 1.0),
        ("skew_reverse_kl", {"skew": 1e-6}, "reverse_kl", 1.0),
    ],
)
def test_limits_are_the_divergences_that_the_docstrings_name(kind, arguments, limit, factor):
    """Prevents a weight or a skew that belongs to the other model: each end must be the right neighbour."""
    student, teacher = torch.tensor([STUDENT]).double().log(), torch.tensor([TEACHER]).double().log()
    value = LOSSES[kind](**arguments).between(student, teacher).item()
    assert value == pytest.approx(factor * LOSSES[limit]().between(student, teacher).item(), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "arguments", "bound"),
    [
        ("jensen_shannon", {}, math.log(2)),
        ("skew_forward_kl", {"skew": 0.1}, math.log(10)),
        ("skew_reverse_kl", {"skew": 0.1}, math.log(10)),
        ("total_variation", {}, 1.0),
    ],
)
@pytest.mark.parametrize("gap", [200.0, math.inf])
def test_bounds_are_met_at_disjoint_distributions(kind, arguments, bound, gap):
    """Prevents the log of an underflowed mixture, which gives NaN or infinity where the measure has a bound."""
    student = torch.tensor([[gap, 0.0]]) if math.isfinite(gap) else torch.tensor([[0.0, -math.inf]])
    teacher = student.flip(-1)
    student.requires_grad_(True)
    value = LOSSES[kind](**arguments)(TokenChunk.from_logits(torch.tensor([0]), student, teacher))
    assert value.item() == pytest.approx(bound, rel=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert torch.isfinite(gradient).all()


def test_reverse_kl_moves_the_student_away_from_what_the_teacher_rules_out():
    """Prevents a floor under log p that also cuts the gradient: the student would keep mass on impossible tokens."""
    student = torch.zeros(1, 4, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 0.0, -math.inf]])
    value = LOSSES["reverse_kl"]()(TokenChunk.from_logits(torch.tensor([0]), student, teacher))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient[0, 3] > 1.0 and (gradient[0, :3] < 0).all()


# -------------------------------------------------------------------------------- arguments and errors


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("jensen_shannon", {"mixture_weight": 0.0}),
        ("jensen_shannon", {"mixture_weight": 1.0}),
        ("jensen_shannon", {"mixture_weight": -0.5}),
        ("skew_forward_kl", {"skew": 0.0}),
        ("skew_forward_kl", {"skew": 1.0}),
        ("skew_reverse_kl", {"skew": 1.5}),
        ("forward_kl", {"temperature": 0.0}),
        ("reverse_kl", {"temperature": -1.0}),
        ("total_variation", {"temperature": math.nan}),
    ],
)
def test_arguments_without_a_meaning_are_refused(kind, arguments):
    """Prevents a loss that is 0 everywhere, or infinite, because of one number in a recipe."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LOSSES[kind](**arguments)


# ------------------------------------------------------------------------------ the reference, by hand


def test_the_reference_plan_is_a_plan():
    """Prevents a reference that drifts: each column carries the mass of one row, and the published cost comes out."""
    student = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.3, 0.4]]).double()
    teacher = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]).double()
    cost = l1_cost(student, teacher)
    torch.testing.assert_close(cost, torch.tensor([[0.2, 1.0], [0.8, 1.0]]).double(), atol=1e-6, rtol=0)
    plan = transport_plan(cost, 0.1, 20)
    torch.testing.assert_close(plan.sum(0), torch.ones(2).double())
    torch.testing.assert_close(
        plan, torch.tensor([[0.95071, 0.04563], [0.04929, 0.95437]]).double(), atol=1e-5, rtol=0
    )
    assert (plan * cost).sum().item() == pytest.approx(1.229573, abs=1e-6)
