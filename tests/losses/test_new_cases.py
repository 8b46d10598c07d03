"""Cases of the losses that weigh or clip: numbers to check by hand, and what each must not see."""

from __future__ import annotations

import math

import pytest
import torch
from battery import Nothing, assert_live, cost, logits_case
from reference_measures import adaptive_kl, balanced_kl, kl, probabilities
from torch import Tensor

from hfkd.losses import LOSSES
from hfkd.objective import Objective
from hfkd.rows import DenseRows, Head, TopKRows
from hfkd.signal import TeacherSignal
from hfkd.support import TokenChunk
from hfkd.terms import Term

TEACHER = torch.tensor([[0.45, 0.25, 0.15, 0.10, 0.05]], dtype=torch.float64)
STUDENT = torch.tensor([[0.25, 0.30, 0.20, 0.05, 0.20]], dtype=torch.float64)
FIRST = torch.tensor([0])


# -------------------------------------------------------------------------------------- adaptive and balanced KL


@pytest.mark.parametrize(("rule", "expected"), [("official", 0.195041), ("crossing", 0.191830)])
def test_adaptive_kl_has_both_readings_of_the_head(rule, expected):
    """Prevents one reading under the other's name: .45 < .5 < .70, so the second entry is head in one of them only."""
    value = cost("adaptive_kl", STUDENT.log(), TEACHER.log(), head_rule=rule)
    assert value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["adaptive_kl", "balanced_kl"])
def test_equal_models_cost_nothing_and_pull_nowhere(kind, dtype):
    """Prevents 0 / 0 in the weight of a student that has arrived, or that is its own teacher at the first step."""
    logits = torch.cat([logits_case()[0], torch.zeros(1, 37), 300 * torch.eye(2, 37)]).to(dtype)
    student = logits.clone().requires_grad_(True)
    value = cost(kind, student, logits)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.abs().max() <= 1e-6 and gradient.abs().max() <= 1e-6


@pytest.mark.parametrize("rule", ["official", "crossing"])
@pytest.mark.parametrize("flatness", [0.01, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9, 0.999])
def test_adaptive_kl_is_exact_however_long_the_head_is(rule, flatness, mass):
    """Prevents a shortcut around the sort that is right for sharp teachers only: flat ones have heads of thousands."""
    generator = torch.Generator().manual_seed(2)
    student, teacher = (flatness * torch.randn(7, 5000, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher[0] *= 20  # a sharp row among flat ones, and the other way round
    teacher[1] *= 0.01
    value = cost("adaptive_kl", student, teacher, head_rule=rule, head_mass=mass)
    torch.testing.assert_close(value, adaptive_kl(student, teacher, None, mass, rule), rtol=1e-9, atol=1e-12)


def test_adaptive_kl_takes_the_tail_bucket_for_an_entry_like_others():
    """Prevents a tail that is always tail: of a flat teacher's top 2 it is the likeliest entry, and so the head."""
    p, q = torch.tensor([[0.1, 0.1, 0.8]]).double(), torch.tensor([[0.2, 0.3, 0.5]]).double()
    teacher = torch.cat([p[:, :2], torch.full((1, 8), 0.1).double()], -1)
    student = torch.cat([q[:, :2], torch.full((1, 8), 0.0625).double()], -1).log()
    rows = TopKRows(torch.tensor([[0, 1]]), teacher[:, :2].log(), 10)
    value = LOSSES["adaptive_kl"]()(TokenChunk(FIRST, student, rows))
    share = 0.3 / 0.6  # |.8 - .5| of |.1 - .2| + |.1 - .3| + |.8 - .5|
    assert value.item() == pytest.approx((share * kl(p, q) + (1 - share) * kl(q, p)).item(), rel=1e-6)


def test_balanced_kl_weighs_both_alike_at_equal_entropies_and_covers_more_the_sharper_the_student_is():
    """Prevents the balance from tipping the wrong way: a student too sharp must be told to cover, one too flat not."""
    shuffled = TEACHER.roll(1, -1)
    both = 0.5 * kl(TEACHER, shuffled) + 0.5 * kl(shuffled, TEACHER)
    assert cost("balanced_kl", shuffled.log(), TEACHER.log()).item() == pytest.approx(both.item(), rel=1e-6)
    weights = []
    for sharpness in (0.25, 0.5, 1.0, 2.0, 4.0):
        student = sharpness * shuffled.log()
        forward, reverse = (cost(kind, student, TEACHER.log()).item() for kind in ("forward_kl", "reverse_kl"))
        weights.append((cost("balanced_kl", student, TEACHER.log()).item() - reverse) / (forward - reverse))
    assert weights == sorted(weights) and weights[0] < 0.5 < weights[-1]
    assert weights[2] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(("kind", "definition"), [("adaptive_kl", adaptive_kl), ("balanced_kl", balanced_kl)])
def test_the_weight_is_a_number_to_the_gradient(kind, definition):
    """Prevents a student that lowers its loss by moving the weight instead of its distribution."""
    student, teacher, targets = logits_case(rows=4)
    student, teacher = student.double().requires_grad_(True), teacher.double()
    total, forward, reverse = (cost(name, student, teacher, targets) for name in (kind, "forward_kl", "reverse_kl"))
    torch.testing.assert_close(total, definition(student, teacher))
    weight = ((total - reverse) / (forward - reverse)).detach()
    (expected,) = torch.autograd.grad((weight * forward + (1 - weight) * reverse).sum(), student, retain_graph=True)
    (gradient,) = torch.autograd.grad(total.sum(), student)
    assert_live(gradient)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------------------------------- alpha-beta, NKD


@pytest.mark.parametrize(
    ("teacher_power", "student_power", "expected"),
    [
        (1.0, 0.0, kl(TEACHER, STUDENT)),
        (0.0, 1.0, kl(STUDENT, TEACHER)),
        (0.5, 0.5, 4 * (1 - (STUDENT * TEACHER).sqrt().sum(-1))),
        (1.0, 1.0, 0.5 * ((STUDENT - TEACHER) ** 2).sum(-1)),
    ],
)
def test_alpha_beta_meets_the_divergences_that_it_holds(teacher_power, student_power, expected):
    """Prevents a family whose corners are not where its docstring says, or swapped powers."""
    powers = {"teacher_power": teacher_power, "student_power": student_power}
    assert cost("alpha_beta", STUDENT.log(), TEACHER.log(), **powers).item() == pytest.approx(expected.item())
    near = {name: power + 1e-4 for name, power in powers.items()}
    close = cost("alpha_beta", STUDENT.log(), TEACHER.log(), **near).item()
    assert close == pytest.approx(expected.item(), rel=5e-3), "a corner is a limit, no case of its own"


def test_normalized_kd_by_hand():
    """Prevents a second part that counts the target, or a T^2 on the first."""
    student, teacher = torch.tensor([[2.0, 1.0, 0.5, -1.0]]), torch.tensor([[3.0, 1.5, 0.0, -2.0]])
    value = cost("normalized_kd", student, teacher)
    assert value.item() == pytest.approx(0.386965 + 1.038239, abs=1e-5)
    assert cost("normalized_kd", student, teacher, non_target_weight=3.0).item() == pytest.approx(
        0.386965 + 2 * 1.038239, abs=1e-5
    )


@pytest.mark.parametrize("gap", [50.0, 200.0, math.inf])
def test_normalized_kd_is_finite_where_all_mass_lies_on_the_target(gap):
    """Prevents 0 / 0 among ids that share no mass at all: every token that both models know by heart."""
    student = torch.zeros(2, 6)
    student[:, 1:] = -gap
    teacher, leaf = student.clone(), student.clone().requires_grad_(True)
    value = cost("normalized_kd", leaf, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
    if gap < math.inf:  # nothing on the target, five equal others: 1.5 ln 5
        assert value.tolist() == pytest.approx(2 * [1.5 * math.log(5)], rel=1e-4)


# -------------------------------------------------------------------------------------------------------- clipped KL


@pytest.mark.parametrize("support", [5, 37, 256])
def test_clipped_kl_that_clips_nothing_is_forward_kl_on_its_support(support):
    """Prevents weights that bend the measure where they ought to be 1."""
    student, teacher, targets = logits_case()
    value = cost("clipped_kl", student, teacher, targets, quantiles=[0.0, 1.0], support=support)
    theirs = teacher if support >= 37 else _top(teacher, support)
    expected = LOSSES["forward_kl"]()(TokenChunk(targets, student, theirs))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def _top(teacher: Tensor, kept: int) -> TopKRows:
    log_probs, ids = torch.log_softmax(teacher, -1).topk(kept, -1)
    return TopKRows(ids, log_probs, teacher.shape[-1])


@pytest.mark.parametrize("quantiles", [[0.0, 0.01], [0.99, 1.0], [0.4, 0.45], None])
@pytest.mark.parametrize("minimum_mass", [0.3, 0.5, 0.9])
def test_clipped_kl_always_keeps_its_minimum_of_mass(quantiles, minimum_mass):
    """Prevents the shortest way to a loss of 0: quantiles that keep nothing to be compared."""
    student, teacher, targets = logits_case(rows=64)
    teacher[:8] *= 10
    generator = torch.Generator().manual_seed(0)
    loss = LOSSES["clipped_kl"](quantiles=quantiles, minimum_mass=minimum_mass, softness=0.001)
    for size in (0.0, 0.3, 10.0):
        for parameter in loss.parameters():  # wherever learning may lead
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
        chunk = TokenChunk.from_logits(targets, student, teacher)
        value = loss(chunk)
        assert torch.isfinite(value).all() and (value >= -1e-6).all()
        kept = chunk.measures["kept_mass"]
        assert kept.shape == (64,) and not kept.requires_grad
        assert (kept >= minimum_mass - 1e-5).all() and (kept <= 1 + 1e-5).all()


def test_clipped_kl_always_compares_the_target():
    """Prevents a clip that removes the one token that is known to be right."""
    teacher = torch.tensor([[0.50, 0.30, 0.15, 0.05]])
    student = torch.tensor([[0.50, 0.30, 0.15, 0.05]]).roll(1, -1)
    arguments = {"quantiles": [0.0, 0.5], "softness": 0.01, "minimum_mass": 0.4}
    seen, unseen = (
        cost("clipped_kl", student.log(), teacher.log(), torch.tensor([target]), **arguments) for target in (3, 0)
    )
    assert unseen.item() == pytest.approx(0.0, abs=1e-6)  # one entry alone: both sides are certain of it
    p, q = 0.50 / 0.55, 0.05 / 0.20
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert seen.item() == pytest.approx(expected, abs=1e-5)


def test_clipped_kl_does_not_see_what_the_student_gives_to_removed_entries():
    """Prevents the belief that it bounds a KL: both sides are taken relative to what is kept."""
    teacher = torch.tensor([[0.30, 0.25, 0.20, 0.15, 0.06, 0.04]])
    student = torch.tensor([[0.0030, 0.0025, 0.0020, 0.0015, 1e-6, 0.991]])  # .99 on what the teacher likes least
    assert cost("forward_kl", student.log(), teacher.log()).item() > 4.0
    assert cost("clipped_kl", student.log(), teacher.log(), quantiles=[0.1, 0.8]).item() < 1e-3


def test_learned_quantiles_begin_wide_and_learn():
    """Prevents quantiles that are called learned and stay where they began, or that begin by keeping nothing."""
    student, teacher, targets = logits_case()
    torch.manual_seed(0)
    loss = LOSSES["clipped_kl"]()
    fixed = cost("clipped_kl", student, teacher, targets, quantiles=[0.04, 0.96])
    torch.testing.assert_close(loss(TokenChunk.from_logits(targets, student, teacher)), fixed, rtol=1e-4, atol=1e-5)
    assert list(loss.parameters()) and not list(LOSSES["clipped_kl"](quantiles=[0.1, 0.9]).parameters())
    objective = Objective([Term("clipped", loss), Term("nothing", Nothing())], 5)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    totals = []
    for _ in range(4):
        optimizer.zero_grad()
        total = objective(
            DenseRows(student, Head(torch.eye(37))), TeacherSignal(DenseRows(teacher, Head(torch.eye(37)))), targets
        ).total
        total.backward()
        totals.append(total.item())
        optimizer.step()
    assert all(parameter.grad is not None for parameter in loss.parameters())
    assert sum(parameter.grad.abs().sum() > 0 for parameter in loss.parameters()) == len(list(loss.parameters()))
    assert totals[-1] < totals[0]


def test_learned_quantiles_are_no_way_for_the_student_to_lower_its_loss():
    """Prevents a gradient through the features: the student would look different in order to be compared less."""
    student, teacher, targets = logits_case(rows=3)
    loss, seen = LOSSES["clipped_kl"](), []
    for module in loss.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    loss(TokenChunk.from_logits(targets, student.requires_grad_(True), teacher))
    assert len(seen) >= 2 and seen[0] is False, "the first layer reads numbers, not the student's graph"


# -------------------------------------------------------------------------------------------- arguments and errors


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("adaptive_kl", {"head_mass": 0.0}),
        ("adaptive_kl", {"head_mass": 1.0}),
        ("adaptive_kl", {"head_rule": "paper"}),
        ("balanced_kl", {"sharpness": 0.0}),
        ("alpha_beta", {"teacher_power": -0.5}),
        ("alpha_beta", {"student_power": -0.5}),
        ("alpha_beta", {"teacher_power": 0.0, "student_power": 0.0}),
        ("normalized_kd", {"non_target_weight": -1.0}),
        ("clipped_kl", {"quantiles": [0.8, 0.2]}),
        ("clipped_kl", {"quantiles": [-0.1, 0.5]}),
        ("clipped_kl", {"quantiles": [0.5, 1.1]}),
        ("clipped_kl", {"softness": 0.0}),
        ("clipped_kl", {"minimum_mass": 1.5}),
        ("clipped_kl", {"support": 0}),
        ("logit_binary_kl", {"support": 0}),
        ("logit_binary_kl", {"rank": 0}),
        ("hinge_ranking", {"margin": -1.0}),
        ("hinge_ranking", {"top": 1}),
        ("logistic_ranking", {"top": 1}),
        ("span_correlation", {"spans": 0}),
        ("span_correlation", {"spans": 1}),
        *((kind, {"temperature": 0.0}) for kind in ("adaptive_kl", "normalized_kd", "logit_mse", "standardized_kl")),
    ],
)
def test_arguments_without_a_meaning_are_refused(kind, arguments):
    """Prevents a loss that is 0 everywhere, or NaN, because of one number in a recipe."""
    with pytest.raises(ValueError, match=next(iter(arguments))) as caught:
        LOSSES[kind](**arguments)
    assert kind in str(caught.value), "the message names the term"


def test_probabilities_of_the_reference_sum_to_one():
    """Prevents a reference that was broken in its one shared step."""
    assert probabilities(logits_case()[0], 2.0).sum(-1).tolist() == pytest.approx([1.0] * 13)
