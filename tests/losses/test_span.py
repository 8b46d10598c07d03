"""Span correlation: the product of neighbours by hand, which rows are neighbours, and spans that are refused."""

from __future__ import annotations

import pytest
import torch
from battery import Nothing, assert_live, logits_case
from reference_measures import span_correlation
from torch import Tensor

from hfkd.losses import LOSSES
from hfkd.objective import Objective, Term
from hfkd.rows import DenseRows, Head, RowLayout
from hfkd.signal import TeacherSignal
from hfkd.support import TokenChunk


def rows_of(logits: Tensor) -> DenseRows:
    return DenseRows(logits, Head(torch.eye(logits.shape[-1])))


def spans_total(spans, student: Tensor, teacher: Tensor, targets: Tensor, sequence: Tensor, size: int | None = None):
    """The value of the loss in an objective, and the gradient of the student's logits."""
    student = student.clone().requires_grad_(True)
    counts = torch.unique_consecutive(sequence, return_counts=True)[1].tolist()
    position = torch.cat([torch.arange(count) for count in counts])
    result = Objective([Term("span", LOSSES["span_correlation"](spans=spans)), Term("nothing", Nothing())], size)(
        rows_of(student), TeacherSignal(rows_of(teacher)), targets, None, RowLayout(sequence, position)
    )
    return result.total.item(), torch.autograd.grad(result.total, student)[0]


def test_span_correlation_by_hand():
    """Prevents products over the vocabulary instead of entry by entry, or a charge on the wrong row."""
    teacher = torch.tensor([[0.5, 0.5], [0.8, 0.2], [0.1, 0.9]])
    student = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.3, 0.7]])
    # teacher: (.40, .10), (.08, .18); student: (.30, .20), (.15, .35)
    expected = [0.0, 0.10**2 + 0.10**2, 0.07**2 + 0.17**2]
    targets = torch.zeros(3, dtype=torch.long)
    for scale in (1.0, 5.0):
        loss = LOSSES["span_correlation"](spans=3, scale=scale)
        value = loss(TokenChunk.from_logits(targets, student.log(), teacher.log()))
        assert value.tolist() == pytest.approx([scale * share for share in expected], rel=1e-5)
        exact = span_correlation(student.log(), teacher.log(), scale=scale)
        assert exact.tolist() == pytest.approx([scale * share for share in expected], rel=1e-5)


SEQUENCE = torch.tensor([0] * 7 + [1] * 3 + [2] * 1 + [3] * 5)


def _pairs(ids: list[int]) -> list[tuple[int, int]]:
    return [(start, min(start + 2, len(ids))) for start in range(0, len(ids), 2)]


def _inner(ids: list[int]) -> list[tuple[int, int]]:
    return [(1, 4), (4, 6)] if len(ids) >= 6 else []


@pytest.mark.parametrize("size", [1, 4, None])
@pytest.mark.parametrize(
    ("spans", "groups"),
    [
        (4, [range(0, 4), range(4, 7), range(7, 10), range(10, 11), range(11, 15), range(15, 16)]),
        (_pairs, [range(0, 2), range(2, 4), range(4, 6), range(7, 9), range(11, 13), range(13, 15)]),
        (_inner, [range(1, 4), range(4, 6)]),
        (f"{__name__}:_inner", [range(1, 4), range(4, 6)]),
    ],
)
def test_spans_stay_within_their_answer(spans, groups, size):
    """Prevents neighbours across two answers, across two spans, or spans cut by the chunk size."""
    student, teacher, targets = logits_case(rows=16)
    leaf = student.double().requires_grad_(True)
    expected = span_correlation(leaf, teacher, groups=groups).sum()
    (gradient,) = torch.autograd.grad(expected, leaf)
    total, ours = spans_total(spans, student, teacher, targets, SEQUENCE, size)
    assert total == pytest.approx(expected.item(), rel=1e-5) and total > 1e-3
    assert_live(gradient)
    torch.testing.assert_close(ours.double(), gradient, rtol=1e-4, atol=1e-6)


def test_a_callable_is_told_the_ids_of_one_answer_at_a_time():
    """Prevents a chunker that reads two answers as one text, or the prompt as well."""
    seen: list[list[int]] = []

    def watched(ids: list[int]) -> list[tuple[int, int]]:
        seen.append(ids)
        return [(0, len(ids))]

    student, teacher, targets = logits_case(rows=16)
    spans_total(watched, student, teacher, targets, SEQUENCE)
    assert seen[:4] == [targets[SEQUENCE == answer].tolist() for answer in range(4)]
    assert all(isinstance(token, int) for ids in seen for token in ids)


def test_spans_of_one_token_cost_nothing():
    """Prevents a charge for a token that has no neighbour."""
    student, teacher, targets = logits_case(rows=16)
    for spans in (lambda ids: [(place, place + 1) for place in range(len(ids))], lambda ids: []):
        total, gradient = spans_total(spans, student, teacher, targets, SEQUENCE)
        assert total == 0.0 and (gradient == 0).all()


@pytest.mark.parametrize(
    "found",
    [[(0, 3), (2, 5)], [(0, 2), (0, 2)], [(0, 99)], [(-1, 2)], [(2, 2)], [(3, 1)]],
    ids=["overlapping", "twice", "too long", "below 0", "empty", "backwards"],
)
def test_impossible_spans_are_refused(found):
    """Prevents a chunker's mistake from becoming a silent choice of which tokens are compared."""
    student, teacher, targets = logits_case(rows=7)
    with pytest.raises(ValueError, match="span_correlation"):
        spans_total(lambda ids: found, student, teacher, targets, torch.zeros(7, dtype=torch.long))
