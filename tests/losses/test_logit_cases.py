"""Cases of the losses that read logits, and of those that read their order only."""

from __future__ import annotations

import math

import pytest
import torch
from battery import Nothing, assert_live, cost, logits_case

from hfkd.losses import LOSSES
from hfkd.objective import Objective, Term
from hfkd.rows import DenseRows, Head
from hfkd.signal import TeacherSignal

# ------------------------------------------------------------------------------------------------- binary KL, MSE


def test_logit_binary_kl_reaches_the_states_and_not_the_head():
    """Prevents the loss of the auxiliary head from pulling at the head that cross-entropy trains."""
    generator = torch.Generator().manual_seed(0)
    states, theirs = (torch.randn(9, 6, generator=generator) for _ in range(2))
    head, their_head = (torch.randn(23, 6, generator=generator).requires_grad_(True) for _ in range(2))
    bias = torch.randn(23, generator=generator).requires_grad_(True)
    states.requires_grad_(True)
    targets = torch.randint(23, (9,), generator=generator)
    signal = TeacherSignal(DenseRows(theirs, Head(their_head)))
    for prepared in (False, True):
        loss = LOSSES["logit_binary_kl"](support=10)
        if prepared:
            loss.prepare(6, 23)
            assert sum(parameter.numel() for parameter in loss.parameters()) == 8 * (6 + 23)
        objective = Objective([Term("binary", loss), {"kind": "cross_entropy", "weight": 0.25}], 4)
        alone = Objective([Term("ce", LOSSES["cross_entropy"](), 0.25)], 4)
        both, other = (
            torch.autograd.grad(one(DenseRows(states, Head(head, bias)), signal, targets).total, [states, head, bias])
            for one in (objective, alone)
        )
        assert_live(*both)
        assert (both[0] - other[0]).abs().max() > 1e-3
        torch.testing.assert_close(both[1], other[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(both[2], other[2], rtol=1e-5, atol=1e-6)


def test_logit_binary_kl_begins_at_the_models_own_logits_and_learns_its_head():
    """Prevents an auxiliary head that starts as noise on the logits, or that never learns."""
    generator = torch.Generator().manual_seed(0)
    states, theirs = (torch.randn(9, 6, generator=generator) for _ in range(2))
    head = torch.randn(23, 6, generator=generator)
    targets = torch.zeros(9, dtype=torch.long)
    signal = TeacherSignal(DenseRows(theirs, Head(head)))
    loss, bare = LOSSES["logit_binary_kl"](), LOSSES["logit_binary_kl"]()
    loss.prepare(6, 23)
    totals = []
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        terms = [Term("binary", loss), Term("nothing", Nothing())]
        total = Objective(terms)(DenseRows(states, Head(head)), signal, targets).total
        total.backward()
        totals.append(total.item())
        optimizer.step()
    terms = [Term("binary", bare), Term("nothing", Nothing())]
    expected = Objective(terms)(DenseRows(states, Head(head)), signal, targets)
    assert totals[0] == pytest.approx(expected.total.item(), rel=1e-5)
    assert totals[2] < totals[1] < totals[0]
    assert all(parameter.grad.abs().max() > 0 for parameter in loss.parameters())


@pytest.mark.parametrize("kind", ["logit_binary_kl", "logit_mse", "standardized_kl"])
def test_a_shift_of_all_logits_is_not_seen(kind):
    """Prevents a student that is punished for a constant that its softmax can't show."""
    student, teacher, _ = logits_case()
    base = cost(kind, student.double(), teacher.double())
    assert base.min() > 1e-3
    shift = torch.linspace(-30, 30, len(student)).double()[:, None]
    torch.testing.assert_close(cost(kind, student + shift, teacher.double()), base, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(cost(kind, student.double(), teacher - shift), base, rtol=1e-6, atol=1e-9)
    assert cost(kind, teacher + shift, teacher.double()).abs().max() < 1e-9


def test_logit_mse_without_centring_sees_the_shift():
    """Prevents a switch that does nothing."""
    student, teacher, _ = logits_case()
    assert cost("logit_mse", teacher + 2.0, teacher, centre=False).tolist() == pytest.approx([4.0] * 13, rel=1e-4)
    assert cost("logit_mse", student, teacher, centre=False).min() > 0


def test_standardized_kl_sees_no_affine_map_of_either_models_logits():
    """Prevents a student that is made to copy the size of its teacher's logits: this loss frees it of that."""
    student, teacher, _ = logits_case()
    student, teacher = student.double(), teacher.double()
    base = cost("standardized_kl", student, teacher, temperature=2.0)
    assert base.min() > 1e-3
    slope, shift = torch.linspace(0.2, 5.0, 13).double()[:, None], torch.linspace(-3, 3, 13).double()[:, None]
    for s, t in ((slope * student + shift, teacher), (student, slope * teacher + shift)):
        torch.testing.assert_close(cost("standardized_kl", s, t, temperature=2.0), base, rtol=1e-5, atol=1e-8)
    assert cost("standardized_kl", slope * teacher + shift, teacher).abs().max() < 1e-8


def test_standardized_kl_survives_a_student_that_says_nothing():
    """Prevents the derivative of a standard deviation of 0: an untrained head, or one that starts at zeros."""
    student = torch.zeros(3, 11, requires_grad=True)
    value = cost("standardized_kl", student, logits_case(rows=3)[1][:, :11])
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


# ---------------------------------------------------------------------------------------------------------- ranking


def test_rankings_by_hand():
    """Prevents pairs turned round, counted twice, or taken in the student's order."""
    student, teacher = torch.tensor([[1.0, 3.0, 2.5, 9.0]]), torch.tensor([[3.0, 2.0, 1.0, -5.0]])
    margins = [1.0 - 3.0, 1.0 - 2.5, 3.0 - 2.5]  # the fourth id isn't among the top 3
    hinge = (3.0 + 2.5 + 0.5) / 3
    logistic = sum(math.log(1 + math.exp(-margin)) for margin in margins) / 3
    assert cost("hinge_ranking", student, teacher, top=3).item() == pytest.approx(hinge, rel=1e-6)
    assert cost("hinge_ranking", student, teacher, top=3, margin=0.0).item() == pytest.approx(3.5 / 3, rel=1e-6)
    assert cost("logistic_ranking", student, teacher, top=3).item() == pytest.approx(logistic, rel=1e-6)
    hot = cost("hinge_ranking", student, teacher, top=3, temperature=2.0, scale_by_temperature_squared=False)
    assert hot.item() == pytest.approx((2.0 + 1.75 + 0.75) / 3, rel=1e-6)


@pytest.mark.parametrize("kind", ["hinge_ranking", "logistic_ranking"])
def test_pairs_that_the_teacher_ties_are_nobodys(kind):
    """Prevents an order that comes from the numbers of the ids, where the teacher has none."""
    teacher = torch.tensor([[1.0, 1.0, 1.0, -9.0]])
    student = torch.tensor([[0.0, 4.0, 2.0, 0.0]], requires_grad=True)
    value = cost(kind, student, teacher, top=3)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.item() == 0.0 and (gradient == 0).all()
    one_tie = cost(kind, student.detach(), torch.tensor([[2.0, 1.0, 1.0, -9.0]]), top=3).item()
    margins = (-4.0, -2.0)
    price = {"hinge_ranking": lambda d: max(0.0, 1 - d), "logistic_ranking": lambda d: math.log(1 + math.exp(-d))}
    assert one_tie == pytest.approx(sum(map(price[kind], margins)) / 3, rel=1e-6), "the mean is over all pairs"


@pytest.mark.parametrize("kind", ["hinge_ranking", "logistic_ranking"])
def test_rankings_say_nothing_of_sizes_nor_of_ids_below_the_top(kind):
    """Prevents the belief that this loss could train a model by itself: that is why it may not stand alone."""
    student, teacher, _ = logits_case()
    order = teacher.argsort(-1, descending=True)
    moved = teacher + 0.0
    moved.scatter_(-1, order[:, 8:], teacher.gather(-1, order[:, 8:]).flip(-1))
    stretched = teacher * 7 + 1
    base = cost(kind, student, teacher)
    assert base.min() > 0
    for other in (moved, stretched):
        torch.testing.assert_close(cost(kind, student, other), base, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["logit_binary_kl", "hinge_ranking", "logistic_ranking", "span_correlation"])
def test_losses_that_see_a_part_only_may_not_stand_alone(kind):
    """Prevents a run of hours that can't teach what its only term doesn't see."""
    with pytest.raises(ValueError, match=kind):
        Objective([{"kind": kind}])
    Objective([{"kind": kind}, {"kind": "cross_entropy"}])
