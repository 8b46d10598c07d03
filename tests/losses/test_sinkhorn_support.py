"""Sinkhorn on the likeliest ids of each pair: what it leaves out is bounded, and the bound is logged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfkd.losses import Sinkhorn
from hfkd.losses.sinkhorn import _cost_on_likeliest
from hfkd.objective import Objective
from hfkd.rows import DenseRows, Head, TopKRows
from hfkd.signal import TeacherSignal
from hfkd.support import TokenChunk


def rows(count: int = 12, width: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two groups of distributions, float64, some sharp and some flat."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 5.0, count)[:, None]
    made = (scale * torch.randn(count, width, generator=generator) for _ in range(2))
    first, second = (one.double().softmax(-1) for one in made)
    return first, second


def by_hand(first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The definition, pair by pair: L1 over the union of both top-k, one entry for the rest; and 2 min(rest)."""
    cost, slack = torch.zeros(len(first), len(second)).double(), torch.zeros(len(first), len(second)).double()
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            union = sorted(set(one.topk(k).indices.tolist()) | set(other.topk(k).indices.tolist()))
            rest = [1 - float(side[union].sum()) for side in (one, other)]
            cost[i, j] = float((one[union] - other[union]).abs().sum()) + abs(rest[0] - rest[1])
            slack[i, j] = 2 * min(rest)
    return cost, slack


@pytest.mark.parametrize("k", [1, 3, 8, 40, 60])
def test_the_cost_of_a_pair_is_that_of_its_union_and_its_rest(k):
    """Prevents a shortcut that counts an id twice that both rows find likely."""
    first, second = rows()
    ours, bound = _cost_on_likeliest(first, second, k)
    expected, slack = by_hand(first, second, k)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bound, slack.amax(dim=1).clamp(min=0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [1, 3, 8, 40])
def test_the_whole_cost_lies_within_the_bound(k):
    """Prevents a bound in the docstring that isn't one."""
    first, second = rows()
    whole = torch.cdist(first, second, p=1)
    ours, bound = _cost_on_likeliest(first, second, k)
    assert (ours <= whole + 1e-9).all() and (whole <= ours + bound[:, None] + 1e-9).all()
    assert (whole - ours).max() > 1e-3 or k == 40


def test_a_larger_support_comes_nearer_to_the_whole():
    """Prevents a support whose size does nothing."""
    student, teacher = (one.log() for one in rows(count=16, width=300))
    whole = Sinkhorn(support=None).between(student, teacher)
    gaps = [float((Sinkhorn(support=k).between(student, teacher) - whole).abs().max()) for k in (2, 8, 32, 128)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.1 * gaps[0]


def test_the_gradient_is_that_of_the_cost():
    """Prevents a gather whose gradient lands on another id."""
    first, second = rows(count=4, width=12)
    logits = first.log().requires_grad_(True)
    loss = Sinkhorn(support=3, epsilon=0.5, pair_weight=0.3, iterations=5)
    assert torch.autograd.gradcheck(lambda z: loss.between(z.log_softmax(-1), second.log()), (logits,), atol=1e-6)


def test_the_pairs_weight_tells_a_row_from_its_neighbour():
    """Prevents a student that answers each question with its neighbour's answer from paying nothing."""
    first, _ = rows(count=6)
    turned = first.roll(1, dims=0)
    free, paired = Sinkhorn(epsilon=0.01, debias=True), Sinkhorn(epsilon=0.01, debias=True, pair_weight=1.0)
    assert free.between(turned.log(), first.log()).sum() < 1e-3
    assert paired.between(turned.log(), first.log()).sum() > 1.0
    assert paired.between(first.log(), first.log()).sum().abs() < 1e-3


def test_a_group_may_be_larger_than_a_chunk():
    """Prevents a transport whose groups are cut where memory is."""
    generator = torch.Generator().manual_seed(2)
    hidden, theirs = torch.randn(20, 6, generator=generator), torch.randn(20, 6, generator=generator)
    weight = torch.randn(50, 6, generator=generator)
    signal, targets = TeacherSignal(DenseRows(theirs, Head(weight))), torch.zeros(20, dtype=torch.long)
    totals = [
        Objective([{"kind": "sinkhorn", "alone": True, "group_size": 10}], size)(
            DenseRows(hidden, Head(weight)), signal, targets
        ).total
        for size in (1, 3, 20, None)
    ]
    assert all(torch.allclose(totals[0], one) for one in totals[1:])


def test_convergence_and_bound_are_noted():
    """Prevents a plan cut off after two steps that nobody hears of."""
    first, second = (one.float().log() for one in rows())
    noted = {}
    for iterations in (1, 200):
        chunk = TokenChunk(torch.zeros(12, dtype=torch.long), first, second)
        Sinkhorn(epsilon=0.5, iterations=iterations, support=4)(chunk)
        noted[iterations] = chunk.measures
    assert noted[1]["unbalanced"].max() > 1e-2 > 1e-5 > noted[200]["unbalanced"].max()
    assert (noted[1]["cost_bound"] > 0).any() and noted[1]["cost_bound"].max() <= 2


@pytest.mark.parametrize("k", [3, 10, 40])
def test_a_sparse_teacher_is_read_on_its_own_ids(k):
    """Prevents a student that equals its teacher from paying for ids that the teacher doesn't list, and a bound that
    isn't one; with all ids listed it is the dense loss.
    """
    student, teacher = rows(count=8, width=40)
    listed = teacher.topk(k)
    ours, bound = _cost_on_likeliest(
        student, torch.zeros_like(teacher).scatter(1, listed.indices, listed.values), k, True
    )
    whole = torch.cdist(student, teacher, p=1)
    assert (ours <= whole + 1e-9).all() and (whole <= ours + bound[:, None] + 1e-9).all()
    targets = torch.zeros(8, dtype=torch.long)
    values, ids = teacher.float().log().topk(k)
    sparse = TopKRows(ids, values, 40)
    assert (
        Sinkhorn(support=None, pair_weight=1.0, epsilon=0.01)(TokenChunk(targets, teacher.log(), sparse)).max() < 1e-4
    )
    if k == 40:
        dense = Sinkhorn(support=None)(TokenChunk(targets, student.float().log(), teacher.float().log()))
        again = Sinkhorn(support=None)(TokenChunk(targets, student.float().log(), sparse))
        torch.testing.assert_close(again, dense, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="sinkhorn: debias .*Set debias to false"):
            Sinkhorn(debias=True)(TokenChunk(targets, student.log(), sparse))


@pytest.mark.parametrize("support", [1, 4])
def test_alike_rows_are_compared_on_their_rest_too(support):
    """Prevents a rest that is forgotten where all rows find the same ids likely, as confident answers do."""
    sharp, flat = torch.zeros(3, 100), torch.zeros(3, 100)
    sharp[:, :support], flat[:, :support] = 10.0, 2.0
    chunk = TokenChunk(torch.zeros(3, dtype=torch.long), sharp, flat)
    value = Sinkhorn(support=support)(chunk)
    whole = Sinkhorn(support=None)(TokenChunk(torch.zeros(3, dtype=torch.long), sharp, flat))
    assert (value <= whole + 1e-5).all() and (whole <= value + chunk.measures["cost_bound"] + 1e-5).all()
    assert value.min() > 0.5 * whole.max()
