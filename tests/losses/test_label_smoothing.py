"""Adaptive label smoothing: how much of the target is the teacher's, and that nothing learns through it."""

from __future__ import annotations

import math

import pytest
import torch
from battery import assert_live, cost, logits_case

from hfkd.losses import LOSSES, AdaptiveLabelSmoothing
from hfkd.rows import TopKRows
from hfkd.support import TokenChunk

KIND = "adaptive_label_smoothing"


@pytest.mark.parametrize(
    ("student", "share"),
    [((0.7, 0.1, 0.1, 0.1), 0.321610), ((0.25, 0.25, 0.25, 0.25), 0.0), ((1.0, 0.0, 0.0, 0.0), 1.0)],
    ids=["between", "uniform", "certain"],
)
def test_the_share_is_one_minus_the_relative_entropy(student, share):
    """Prevents an entropy in bits, or one that isn't divided by its largest, and smoothing where nothing is sure."""
    loss = AdaptiveLabelSmoothing(cap=1.0)
    chunk = TokenChunk.from_logits(torch.tensor([0]), torch.tensor([student]).log(), torch.zeros(1, 4))
    loss(chunk)
    assert chunk.measures["smoothing"].item() == pytest.approx(share, abs=1e-6)


def test_the_cap_leaves_something_of_the_text():
    """Prevents a student that is sure of the wrong token and hears of the right one no more."""
    student = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True)
    sure = student.detach().clone()
    values = {cap: cost(KIND, student, sure, torch.tensor([1]), cap=cap) for cap in (0.9, 1.0)}
    slopes = {cap: torch.autograd.grad(value.sum(), student)[0][0, 1].item() for cap, value in values.items()}
    assert slopes[0.9] == pytest.approx(-0.1, rel=1e-3) and abs(slopes[1.0]) < 1e-6


def test_without_a_share_it_is_cross_entropy():
    """Prevents a target from which the text's token has lost some of its mass."""
    student, teacher, targets = logits_case()
    leaf, other = student.clone().requires_grad_(True), student.clone().requires_grad_(True)
    ours, theirs = cost(KIND, leaf, teacher, targets, cap=0.0), cost("cross_entropy", other, teacher, targets)
    torch.testing.assert_close(ours, theirs)
    slopes = [torch.autograd.grad(value.sum(), one)[0] for value, one in ((ours, leaf), (theirs, other))]
    assert_live(*slopes)
    torch.testing.assert_close(*slopes)


def test_the_gradient_is_that_of_the_cross_entropy_to_the_mixture():
    """Prevents a term -log q that is learned through the share: a student that lowers its loss by growing unsure."""
    student, teacher, targets = logits_case()
    leaf = student.clone().requires_grad_(True)
    (ours,) = torch.autograd.grad(cost(KIND, leaf, teacher, targets).sum(), leaf)
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    share = (1 + (q * q.log()).sum(-1) / math.log(q.shape[-1])).clamp(max=0.9)[:, None]
    mixture = (1 - share) * torch.nn.functional.one_hot(targets, q.shape[-1]) + share * p
    torch.testing.assert_close(ours.double(), q - mixture, rtol=1e-4, atol=1e-6)


def test_it_is_zero_at_its_own_optimum():
    """Prevents a loss that can't be told from one that is still learning."""
    student = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).log()
    share = 0.321610
    teacher = (student.exp() - (1 - share) * torch.tensor([[1.0, 0.0, 0.0, 0.0]])) / share
    assert teacher.min() > 0 and teacher.sum().item() == pytest.approx(1.0)
    assert cost(KIND, student, teacher.log()).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_sparse_teacher_that_does_not_list_the_target(tail):
    """Prevents the text's mass from being put on whichever id comes last."""
    student, teacher = torch.tensor([[2.0, 1.0, 0.5, -1.0]]), torch.tensor([[3.0, 1.5, 0.0, -2.0]])
    known, ids = teacher.log_softmax(-1).topk(2, -1)
    chunk = TokenChunk(torch.tensor([3]), student, TopKRows(ids, known, 4), tail=tail)
    if tail == "renormalize":
        with pytest.raises(ValueError, match="top-k ids don't hold it"):
            LOSSES[KIND]()(chunk)
        return
    q = student.double().softmax(-1)[0]
    p = teacher.double().softmax(-1)[0]
    q, p = (torch.tensor([x[0], x[1], x[2] + x[3]]) for x in (q, p))
    share = 1 + float((q * q.log()).sum()) / math.log(3)
    mixture = share * p + (1 - share) * torch.tensor([0.0, 0.0, 1.0])
    expected = float((mixture * (mixture / q).log()).sum())
    assert LOSSES[KIND]()(chunk).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kept", [1, 4])
def test_one_entry_alone_costs_nothing(kept):
    """Prevents a division by log 1 where a teacher's one id is all that is compared."""
    student, teacher = torch.tensor([[2.0, 1.0, 0.5, -1.0]]), torch.tensor([[3.0, 1.5, 0.0, -2.0]])
    known, ids = teacher.log_softmax(-1).topk(kept, -1)
    value = LOSSES[KIND]()(TokenChunk(torch.tensor([0]), student, TopKRows(ids, known, 4), tail="renormalize"))
    assert math.isfinite(value.item()) and (value.item() == 0) == (kept == 1)


def test_it_fits_the_text():
    """Prevents a student that is taught to be surer of what it has written itself."""
    assert AdaptiveLabelSmoothing.fits_text


@pytest.mark.parametrize("cap", [-0.1, 1.1, math.nan])
def test_a_cap_outside_its_limits_is_refused(cap):
    """Prevents a target with negative probabilities."""
    with pytest.raises(ValueError, match=rf"{KIND}: cap is .*expected a number from 0"):
        AdaptiveLabelSmoothing(cap=cap)
