"""Sinkhorn: the published 2 x 2 case, its grouping of rows, its known weaknesses, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from reference import DenseTerm, dense_objective, sinkhorn
from torch import Tensor

from hfkd.losses import Sinkhorn
from hfkd.objective import build_objective
from hfkd.rows import DenseRows, Head, RowLayout
from hfkd.signal import TeacherSignal
from hfkd.support import TokenChunk

STUDENT = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.3, 0.4]]).log()
TEACHER = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]).log()


def random_logits(rows: int, vocabulary: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))


def cost_of(loss: Sinkhorn, student: Tensor, teacher: Tensor) -> Tensor:
    return loss(TokenChunk.from_logits(torch.zeros(len(student), dtype=torch.long), student, teacher))


@pytest.mark.parametrize(
    ("epsilon", "expected"),
    [
        (0.1, 1.229573),
        (1.0, 1.455335),
        (0.005, 1.215),  # 20 iterations haven't reached the best assignment, .2 + 1.0 (the other one costs 1.0 + .8)
    ],
)
def test_published_two_by_two_case(epsilon, expected):
    """Prevents another iteration order, cost or scale: the rows' shares sum to the published cost, no mean of it."""
    rows = Sinkhorn(epsilon=epsilon).between(STUDENT, TEACHER)
    assert rows.shape == (2,)
    assert rows.sum().item() == pytest.approx(expected, abs=2e-6)
    ours = build_objective([{"kind": "sinkhorn", "epsilon": epsilon, "alone": True}])(
        DenseRows(STUDENT, Head(torch.eye(3))),
        TeacherSignal(DenseRows(TEACHER, Head(torch.eye(3)))),
        torch.tensor([0, 1]),
    )
    assert ours.total.item() == pytest.approx(expected, abs=2e-6)


def test_more_iterations_reach_the_best_assignment():
    """Prevents iterations that are counted but not made."""
    assert Sinkhorn(epsilon=0.005, iterations=2000).between(STUDENT, TEACHER).sum().item() == pytest.approx(
        1.2, abs=3e-4
    )


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.02, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_disjoint_rows_cost_two_each(epsilon, dtype):
    """Prevents exp(-2 / epsilon) from underflowing to 0 / 0, which the published code does in half precision."""
    student = torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf], [-torch.inf, 0.0, -torch.inf, -torch.inf]])
    teacher = student.roll(2, dims=-1)
    student = student.to(dtype).requires_grad_(True)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            rows = cost_of(Sinkhorn(epsilon=epsilon), student, teacher.to(dtype))
        assert rows.tolist() == pytest.approx([2.0, 2.0], rel=1e-5)
        (gradient,) = torch.autograd.grad(rows.sum(), student)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_gradients_stay_finite_at_small_epsilon(epsilon):
    """Prevents a smoothing that looks harmless in the value and is NaN in the gradient."""
    student, teacher = random_logits(16)
    student.requires_grad_(True)
    (gradient,) = torch.autograd.grad(cost_of(Sinkhorn(epsilon=epsilon), student, teacher).sum(), student)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 1e-4


def test_order_of_the_teachers_rows_is_not_seen():
    """Prevents the belief that this loss pairs rows: it doesn't, and that is why it may not stand alone."""
    student, teacher = random_logits(8)
    plain = cost_of(Sinkhorn(), student, teacher).sum()
    shuffled = cost_of(
        Sinkhorn(), student, teacher[torch.randperm(8, generator=torch.Generator().manual_seed(1))]
    ).sum()
    assert plain > 1 and shuffled.item() == pytest.approx(plain.item(), rel=1e-5)


def test_alike_rows_cost_something_unless_debiased():
    """Prevents a floor under the loss that comes from the smoothing and not from any difference."""
    logits = 0.1 * random_logits(8)[0]
    assert cost_of(Sinkhorn(), logits, logits).sum() > 0.1
    assert cost_of(Sinkhorn(debias=True), logits, logits).abs().max() < 1e-6
    student, teacher = random_logits(8)
    assert cost_of(Sinkhorn(debias=True), student, teacher).sum() > 1e-2


def test_detached_plan_sends_the_gradient_through_the_cost_only():
    """Prevents a switch that changes the value, or that changes nothing."""
    student, teacher = random_logits(6)
    gradients = []
    for detached in (True, False):
        exact = student.double().requires_grad_(True)
        expected = sinkhorn(exact, teacher.double(), epsilon=0.5, detach_plan=detached)
        ours_from = student.clone().requires_grad_(True)
        ours = cost_of(Sinkhorn(epsilon=0.5, detach_plan=detached), ours_from, teacher)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)
        (theirs,) = torch.autograd.grad(expected.sum(), exact)
        (gradient,) = torch.autograd.grad(ours.sum(), ours_from)
        assert theirs.abs().max() > 1e-2
        torch.testing.assert_close(gradient.double(), theirs, rtol=1e-4, atol=1e-6)
        gradients.append(gradient)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


SEQUENCES = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
POSITIONS = torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3])


@pytest.mark.parametrize(
    ("mode", "groups"),
    [
        ("sequence", [[0, 1, 2], [3, 4], [5, 6, 7, 8]]),
        ("batch", [[0, 3, 5], [1, 4, 6], [2, 7], [8]]),
        ("tokens", [[0, 1, 2, 3], [4, 5, 6, 7], [8]]),
    ],
)
@pytest.mark.parametrize("chunk_size", [1, 5, 9, None])
def test_modes_group_the_rows_that_they_name(mode, groups, chunk_size):
    """Prevents rows of other answers or other positions from entering a group, and groups cut by the chunk size."""
    generator = torch.Generator().manual_seed(5)
    states, theirs = (torch.randn(9, 4, generator=generator) for _ in range(2))
    head, their_head = (torch.randn(12, 4, generator=generator) for _ in range(2))
    weights = torch.linspace(0.2, 1.0, 9)
    targets = torch.zeros(9, dtype=torch.long)
    states.requires_grad_(True)
    head.requires_grad_(True)
    expected = dense_objective(
        states, head, None, theirs @ their_head.T, targets, [DenseTerm("sinkhorn", 1.0, {"groups": groups})], weights
    )
    result = build_objective([{"kind": "sinkhorn", "mode": mode, "group_size": 4, "alone": True}], chunk_size)(
        DenseRows(states, Head(head)),
        TeacherSignal(DenseRows(theirs, Head(their_head))),
        targets,
        weights,
        RowLayout(SEQUENCES, POSITIONS),
    )
    gradients = torch.autograd.grad(result.total, [states, head])
    assert result.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    for ours, exact in zip(gradients, (expected.hidden, expected.weight), strict=True):
        assert exact.abs().max() > 1e-2
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_layout_of_padded_labels_counts_answers_from_their_first_token():
    """Prevents positions that are shifted by the prompt's length or by the side of the padding."""
    labels = torch.tensor([[-100, -100, 7, 8, 9, -100], [-100, -100, -100, -100, 5, 6], [-100, 1, 2, 3, 4, -100]])
    layout = RowLayout.of(labels)
    assert layout.sequence.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert layout.position.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]


def test_refuses_to_stand_alone_unless_told_to():
    """Prevents a student that answers each question with its neighbour's answer, at no cost."""
    for terms in ("sinkhorn", [{"kind": "sinkhorn"}], [{"kind": "sinkhorn"}, {"kind": "forward_kl", "weight": 0.0}]):
        with pytest.raises(ValueError, match="alone"):
            build_objective(terms)
    build_objective([{"kind": "sinkhorn", "alone": True}])
    build_objective([{"kind": "sinkhorn"}, {"kind": "forward_kl"}])


@pytest.mark.parametrize(
    "arguments", [{"epsilon": 0.0}, {"epsilon": -1.0}, {"iterations": 0}, {"mode": "rows"}, {"group_size": 0}]
)
def test_arguments_without_a_meaning_are_refused(arguments):
    """Prevents a division by 0 or a silent default in the middle of a run."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Sinkhorn(**arguments)
