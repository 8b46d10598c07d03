"""The losses that read a teacher of another vocabulary, on rows that lie beside the student's."""

from __future__ import annotations

import pytest
import torch
from battery import assert_live, assert_near, logits_case, only, sparse_reference
from reference_measures import coins, uld
from torch import Tensor

from hfkd.losses import LOSSES
from hfkd.objective import build_objective
from hfkd.rows import DenseRows, Head, RowLayout, TopKRows
from hfkd.signal import TeacherSignal
from hfkd.support import TokenChunk
from hfkd.teacher_rows import AlignedRows


def aligned_case(rows: int = 17, seed: int = 0, sure: float = 0.0):
    """Spans of one to four tokens, some tokens outside all; a teacher with other ids, more rows and its own head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sizes = [1, 3, -1, 2, -1, -1, 4, 1, 2, 1, 1]
    span, place, reached = [], [], 0
    for number, size in enumerate(sizes):
        span += [number] * abs(size)
        place += [reached if size > 0 else -1, *[-1] * (abs(size) - 1)]
        reached += 2 * (size > 0)
    assert len(span) == len(place) and len(span) >= rows
    span, place = torch.tensor(span[:rows]), torch.tensor(place[:rows])
    hidden, weight = normal(rows, 8), normal(37, 8)
    targets = torch.randint(37, (rows,), generator=generator)
    weight_teacher = DenseRows(normal(reached, 6), Head(normal(53, 6)))
    said = -torch.rand(len(sizes), generator=generator)[span] * 4 - sure
    outside = torch.tensor([sizes[number] < 0 for number in span.tolist()])
    teacher = AlignedRows(weight_teacher, place, span, torch.where(outside, 0.0, said))
    return hidden, weight, targets, teacher


def reference_of(kind: str, arguments: dict, logits: Tensor, targets: Tensor, teacher: AlignedRows) -> Tensor:
    """[N] the definitions, a span at a time, in float64."""
    rows = torch.zeros(len(logits), dtype=torch.float64)
    others = teacher.rows.head.logits(teacher.rows.hidden).double()
    for number, place in enumerate(teacher.place.tolist()):
        if place < 0:
            continue
        if kind == "uld":
            value = uld(logits[number : number + 1], others[place : place + 1], **arguments)
        else:
            power = arguments.get("power", 1.0)
            inside = (teacher.span == teacher.span[number]).nonzero()[:, 0]
            likely = torch.softmax(logits[inside], -1).gather(-1, targets[inside, None]).prod()
            said = teacher.span_log_probs[number].double().exp()
            value = coins(
                (said[None] ** power, 1 - said[None] ** power), (likely[None] ** power, 1 - likely[None] ** power)
            )
        rows = rows.index_add(0, torch.tensor([number]), value)
    return rows


CASES = [
    ("uld", {}),
    ("uld", {"top": 3}),
    ("uld", {"top": 45}),
    ("uld", {"temperature": 2.0}),
    ("span_likelihood", {}),
    ("span_likelihood", {"power": 0.4}),
    ("span_likelihood", {"power": 2.0}),
]


@pytest.mark.parametrize(("kind", "arguments"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_aligned_rows_are_measured_by_the_definition(kind, arguments, weighted):
    """Prevents spans that are cut by a chunk or a block, summed with their neighbours or read off the wrong row."""
    hidden, weight, targets, teacher = aligned_case()
    factors = torch.rand(len(targets)) + 0.5 if weighted else None
    exact = hidden.double().requires_grad_(True)
    expected = reference_of(kind, arguments, exact @ weight.double().T, targets, teacher)
    assert (expected > 1e-3).sum() >= 6 and (expected == 0).sum() >= 6
    expected = (expected if factors is None else expected * factors).sum()
    (gradient,) = torch.autograd.grad(expected, exact)
    for size in (1, 4, 5, None):
        leaf = hidden.clone().requires_grad_(True)
        result = build_objective(only(kind, arguments), size)(
            DenseRows(leaf, Head(weight)), TeacherSignal(teacher), targets, factors, measure_agreement=True
        )
        (ours,) = torch.autograd.grad(result.total, leaf)
        assert_live(ours, gradient)
        assert_near(result.total, expected, 1e-5)
        assert_near(ours, gradient, 1e-5)
        assert result.agreed is None


def test_spans_larger_than_a_reading_stay_whole(monkeypatch):
    """Prevents a span of a long word or of one character's bytes that is cut where the reading ends."""
    hidden, weight, targets, teacher = aligned_case()
    loss = LOSSES["span_likelihood"]()
    layout = RowLayout.single(len(targets), targets.device)
    assert loss.groups(layout) is None
    outcomes = []
    for rows in (1, 2, 3, 64):
        monkeypatch.setattr("hfkd.losses.cross_tokenizer._RUN", rows)
        groups = loss.groups(RowLayout(layout.sequence, layout.position, targets, teacher.span))
        for number in teacher.span.unique():
            assert len(groups[teacher.span == number].unique()) == 1
        assert (groups.diff() >= 0).all() and len(groups.unique()) == {1: 10, 2: 7, 3: 6, 64: 1}.get(rows)
        total = build_objective([loss], 4)(DenseRows(hidden, Head(weight)), TeacherSignal(teacher), targets).total
        outcomes.append(float(total))
    assert outcomes == pytest.approx([outcomes[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_certain_and_impossible_spans_stay_finite(power):
    """Prevents NaN from log(1 - P) at the first span that student or teacher is sure of, which are most of them."""
    logits = torch.zeros(6, 5)
    logits[0, 0] = logits[1, 1] = logits[2, 2] = 200.0
    logits[4, 0] = 200.0
    targets = torch.tensor([0, 1, 2, 3, 1, 2])
    span, place = torch.tensor([0, 0, 1, 2, 3, 4]), torch.tensor([0, -1, 1, 2, 3, 4])
    said = torch.tensor([0.0, 0.0, -300.0, -1e-9, 0.0, -2000.0])
    teacher = AlignedRows(DenseRows(torch.zeros(5, 2), Head(torch.zeros(7, 2))), place, span, said)
    leaf = logits.clone().requires_grad_(True)
    chunk = TokenChunk(targets, leaf, torch.zeros(6, 7), alignment=teacher.alignment(slice(None)))
    values = LOSSES["span_likelihood"](power)(chunk)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    assert torch.isfinite(values).all() and torch.isfinite(gradient).all() and (values >= 0).all()
    assert values[0] < 1e-6 and values[1] == 0, "both are sure of the same"
    assert values[2] > 100, "the student is sure of what the teacher rules out"
    assert values[4] > 100 * power, "the student rules out what the teacher is sure of"


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_span_likelihood_of_listed_ids(power):
    """Prevents a cached teacher whose unlisted token has no probability at all: it is in the tail."""
    student, teacher, targets = logits_case()
    log_probs, ids = torch.log_softmax(teacher.double(), -1).topk(6, -1)
    assert not (ids == targets[:, None]).any(-1).all() and (ids == targets[:, None]).any()
    exact, leaf = student.double().requires_grad_(True), student.clone().requires_grad_(True)
    expected = sparse_reference("span_likelihood", {"power": power}, exact, teacher, targets, ids)
    value = LOSSES["span_likelihood"](power)(TokenChunk(targets, leaf, TopKRows(ids, log_probs.float(), 37)))
    assert_near(value, expected, 1e-5)
    assert_near(*(torch.autograd.grad(v.sum(), x)[0] for v, x in ((value, leaf), (expected, exact))), 1e-4)


def test_settings_that_mean_nothing_are_refused():
    """Prevents an exponent of 0, under which every text is certain, and a comparison of no probabilities."""
    for power in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="span_likelihood: power is"):
            LOSSES["span_likelihood"](power)
    for top in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match="uld: top is"):
            LOSSES["uld"](top=top)
    with pytest.raises(ValueError, match="uld"):
        build_objective("uld")
