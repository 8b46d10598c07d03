"""Teachers of which only the likeliest ids are known: what every loss that reads a distribution makes of them.

`test_battery.py` compares each loss with its definition on the listed ids and what is left; here is what must hold of
the K that somebody chose, of `tail="renormalize"`, and of a tail too small to be seen.
"""

from __future__ import annotations

import pytest
import torch
from battery import (
    CASE_IDS,
    CASES,
    GROUP,
    ROWS,
    VOCABULARY,
    World,
    assert_live,
    assert_near,
    assert_reached,
    every_row_by_row_case,
    logits_case,
    only,
    reference_value,
    runs,
    sparse_reference,
)
from reference_measures import probabilities, span_correlation
from torch import Tensor

from hfkd.losses import LOSSES, Divergence
from hfkd.objective import Objective
from hfkd.rows import DenseRows, Head, TopKRows
from hfkd.signal import TeacherSignal
from hfkd.support import TokenChunk

READERS = [
    place
    for place, (kind, arguments) in enumerate(CASES)
    if issubclass(LOSSES[kind], Divergence) and arguments.get("centre", True)
]
every_reader = pytest.mark.parametrize(
    ("kind", "arguments"), [CASES[place] for place in READERS], ids=[CASE_IDS[place] for place in READERS]
)


def top(teacher_logits: Tensor, kept: int, dtype: torch.dtype = torch.float32) -> TopKRows:
    """The likeliest `kept` ids of each row, as a store of teacher rows would have them."""
    log_probs, ids = torch.log_softmax(teacher_logits.double(), -1).topk(kept, -1)
    return TopKRows(ids, log_probs.to(dtype), teacher_logits.shape[-1])


# -------------------------------------------------------------------------------------------- every id is listed


@every_reader
def test_listing_every_id_is_the_dense_loss(kind, arguments):
    """Prevents a run on cached rows that is another run than the one beside the live teacher, at no loss of mass."""
    student, teacher, targets = logits_case()
    expected = reference_value(kind, arguments, student, teacher, targets)
    outcomes = []
    for theirs in (teacher, top(teacher, VOCABULARY)):
        leaf = student.clone().requires_grad_(True)
        value = LOSSES[kind](**arguments)(TokenChunk(targets, leaf, theirs))
        outcomes.append((value, torch.autograd.grad(value.sum(), leaf)[0]))
    (dense, dense_gradient), (sparse, sparse_gradient) = outcomes
    assert_live(dense_gradient)
    assert_near(sparse, expected, 1e-5)
    assert_near(sparse, dense, 1e-5)
    assert_near(sparse_gradient, dense_gradient, 1e-4)


@every_reader
def test_order_of_the_listed_ids_is_not_seen(kind, arguments):
    """Prevents a loss that takes the first listed id for the likeliest: stores are free to sort theirs by id."""
    if arguments.get("debias"):
        return  # refused on lists that aren't whole: test_sinkhorn_support.py
    student, teacher, targets = logits_case()
    rows = top(teacher, 9)
    shuffle = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    other = TopKRows(rows.ids[:, shuffle], rows.log_probs[:, shuffle], VOCABULARY)
    first, second = (LOSSES[kind](**arguments)(TokenChunk(targets, student, theirs)) for theirs in (rows, other))
    assert first.abs().max() > 1e-6
    assert_near(second, first, 1e-5)


# ------------------------------------------------------------------------------------------- some ids are listed


F_DIVERGENCES = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jensen_shannon", {}),
    ("jensen_shannon", {"mixture_weight": 0.1}),
    ("skew_forward_kl", {}),
    ("skew_reverse_kl", {}),
    ("total_variation", {}),
    # An alpha-beta divergence joins entries without gain only where its powers sum to 1.
    ("alpha_beta", {"teacher_power": 0.5, "student_power": 0.5}),
    ("alpha_beta", {"teacher_power": 0.8, "student_power": 0.2}),
    ("alpha_beta", {"teacher_power": 0.0, "student_power": 1.0}),
]


@pytest.mark.parametrize(("kind", "arguments"), F_DIVERGENCES)
def test_a_tail_bucket_never_costs_more_than_the_whole(kind, arguments):
    """Prevents a top-k loss that invents cost: joining entries loses sight of differences, it can't add any."""
    student, teacher, targets = logits_case()
    student, teacher = student.double(), teacher.double()
    loss = LOSSES[kind](**arguments)
    dense = loss(TokenChunk(targets, student, teacher))
    before = torch.zeros(ROWS, dtype=torch.float64)
    for kept in (1, 2, 4, 8, 16, 32, VOCABULARY - 1, VOCABULARY):
        value = loss(TokenChunk(targets, student, top(teacher, kept, torch.float64)))
        assert (value >= before - 1e-9).all(), f"less at K = {kept}"
        assert (value <= dense + 1e-9).all(), f"more than the whole at K = {kept}"
        before = value
    torch.testing.assert_close(before, dense, rtol=1e-9, atol=1e-12)
    assert (loss(TokenChunk(targets, student, top(teacher, 2, torch.float64))) < 0.9 * dense).any()


@every_reader
def test_gradients_are_finite_where_the_tail_is_tiny(kind, arguments):
    """Prevents NaN from the log of a tail that rounding made 0 or negative: most rows of a sharp teacher have one."""
    if arguments.get("debias"):
        return  # refused on lists that aren't whole: test_sinkhorn_support.py
    teacher = torch.full((6, VOCABULARY), -40.0) - torch.arange(VOCABULARY) / 64
    teacher[:, :4] = torch.tensor([3.0, 1.0, 0.5, 0.0])
    teacher[0, 0] = 60.0  # certain: every other entry is far below float32's resolution of 1
    rows = top(teacher, 4)
    rows = TopKRows(rows.ids, rows.log_probs + 1e-7, VOCABULARY)  # rounded up: the listed mass is above 1
    student = torch.zeros(6, VOCABULARY) + torch.linspace(0, 1, VOCABULARY)
    student[2, 20], student[3, 0], student[4, 0] = 60.0, 60.0, -60.0
    for targets in (torch.zeros(6, dtype=torch.long), torch.full((6,), 30)):
        leaf = student.clone().requires_grad_(True)
        value = LOSSES[kind](**arguments)(TokenChunk(targets, leaf, rows))
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
        if kind != "clipped_kl":  # which may keep one entry alone here, and that can't be wrong
            assert_live(gradient)


@every_row_by_row_case
def test_a_target_that_is_not_listed(kind, arguments):
    """Prevents an index outside the support, or the wrong entry, where the teacher's list doesn't hold the answer."""
    student, teacher, _ = logits_case()
    if not issubclass(LOSSES[kind], Divergence):
        return  # reads no teacher
    rows = top(teacher, 6)
    unlikely = teacher.argmin(-1)
    exact = student.double().requires_grad_(True)
    expected = sparse_reference(kind, arguments, exact, teacher, unlikely, rows.ids, _temperature(kind))
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    rows = TopKRows(rows.ids, _at(teacher, rows.ids, _temperature(kind)), VOCABULARY, _temperature(kind))
    student.requires_grad_(True)
    value = LOSSES[kind](**arguments)(TokenChunk(unlikely, student, rows))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert_live(gradient)
    assert_near(value, expected, 1e-5)
    assert_near(gradient, expected_gradient, 1e-4)


def _temperature(kind: str) -> float:
    """The temperature that a loss has where none is given."""
    return LOSSES[kind]().temperature


def _at(teacher: Tensor, ids: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(teacher.double() / temperature, -1).gather(-1, ids).float()


# ------------------------------------------------------------------------------------------- tail: "renormalize"


@every_row_by_row_case
def test_renormalized_rows_are_measured_among_the_listed_ids_only(kind, arguments):
    """Prevents a "top-k KL" that is none of the two known ones, and a push on ids that it says it doesn't read."""
    if not issubclass(LOSSES[kind], Divergence):
        return  # reads no teacher
    student, teacher, _ = logits_case()
    temperature = _temperature(kind)
    ids = teacher.topk(6, -1).indices
    targets = ids[:, 2]
    exact = student.double().requires_grad_(True)
    expected = sparse_reference(kind, arguments, exact, teacher, targets, ids, temperature, tail="renormalize")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    student.requires_grad_(True)
    rows = TopKRows(ids, _at(teacher, ids, temperature), VOCABULARY, temperature)
    value = LOSSES[kind](**arguments)(TokenChunk(targets, student, rows, tail="renormalize"))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert_live(gradient, expected_gradient)
    assert_near(value, expected, 1e-5)
    assert_near(gradient, expected_gradient, 1e-4)
    assert (gradient.scatter(-1, ids, 0.0) == 0).all()


@every_row_by_row_case
def test_renormalizing_nothing_away_changes_nothing(kind, arguments):
    """Prevents a `tail` that changes rows which have none."""
    if not issubclass(LOSSES[kind], Divergence):
        return  # reads no teacher
    student, teacher, targets = logits_case()
    loss, rows = LOSSES[kind](**arguments), top(teacher, VOCABULARY)
    rows = TopKRows(rows.ids, _at(teacher, rows.ids, _temperature(kind)), VOCABULARY, _temperature(kind))
    bucket, renormalized = (loss(TokenChunk(targets, student, rows, tail=tail)) for tail in ("bucket", "renormalize"))
    assert_near(renormalized, bucket, 1e-6)


@every_row_by_row_case
def test_the_objective_hands_its_tail_to_every_chunk(kind, arguments):
    """Prevents a setting that reaches the first chunk, or only the description of the run."""
    world = World()
    temperature = LOSSES[kind]().temperature if issubclass(LOSSES[kind], Divergence) else 1.0
    ids = world.teacher_logits.topk(6, -1).indices
    rows = TopKRows(ids, _at(world.teacher_logits, ids, temperature), VOCABULARY, temperature)
    logits = (world.hidden @ world.weight.T + world.bias).detach()
    for tail in ("bucket", "renormalize"):
        loss = LOSSES[kind](**arguments)
        expected = loss(TokenChunk(ids[:, 1], logits, rows, tail=tail)).sum()
        for size in (1, GROUP, None):
            result = Objective(only(kind, arguments), size, tail=tail)(
                DenseRows(world.hidden, Head(world.weight, world.bias)), TeacherSignal(rows), ids[:, 1]
            )
            assert_reached(kind, torch.autograd.grad(result.total, [world.hidden, world.weight, world.bias]))
            assert_near(result.total, expected, 1e-5)


def test_only_two_tails_are_known():
    """Prevents a misspelt tail that is taken for the default in silence."""
    with pytest.raises(ValueError, match="renormalise"):
        Objective("forward_kl", tail="renormalise")


# -------------------------------------------------------------------------------------------- refused, and joined


def test_logits_of_unknown_level_are_refused_where_the_level_counts():
    """Prevents a squared distance to a number that depends on how the teacher's rows were stored."""
    student, teacher, targets = logits_case()
    with pytest.raises(ValueError, match="centre"):
        LOSSES["logit_mse"](centre=False)(TokenChunk(targets, student, top(teacher, 6)))


def test_spans_of_a_sparse_teacher_are_read_on_ids_that_all_their_rows_share():
    """Prevents products of neighbouring rows taken column by column over lists of different ids."""
    world, kept = World(), VOCABULARY
    rows = top(world.teacher_logits, kept)
    arguments = {"spans": GROUP}
    groups = runs("span_correlation", arguments, ROWS)
    logits = (world.hidden @ world.weight.T + world.bias).detach()
    expected = span_correlation(logits, world.teacher_logits, groups=groups).sum()
    assert expected > 1e-2
    for size in (1, GROUP, None):
        result = Objective(only("span_correlation", arguments), size)(
            DenseRows(world.hidden, Head(world.weight, world.bias)), TeacherSignal(rows), world.targets
        )
        assert_reached("span_correlation", torch.autograd.grad(result.total, [world.hidden, world.weight, world.bias]))
        assert_near(result.total, expected, 1e-5)


def test_spans_of_a_sparse_teacher_agree_with_the_whole_where_the_lists_hold_the_mass():
    """Prevents a top-k form of the loss that measures something else than the whole does."""
    student, teacher, targets = logits_case(rows=4)
    student, teacher = 3 * student, 3 * teacher
    student[:, [0, -1]] += 14.0  # the first and the last of all ids, which an extra column would push out
    teacher[:, [0, -1]] += 12.0
    expected = span_correlation(student, teacher)
    value = LOSSES["span_correlation"]()(TokenChunk(targets, student, top(teacher, 20)))
    assert probabilities(teacher).topk(20, -1).values.sum(-1).min() > 0.999
    assert expected.max() > 1e-3
    torch.testing.assert_close(value.double(), expected, rtol=1e-2, atol=1e-4)
