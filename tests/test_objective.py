"""The objective as its users meet it: recipe forms, refusals, sparse teachers, padded vocabularies."""

from __future__ import annotations

import json
from inspect import signature

import pytest
import torch
from torch import Tensor, nn

from hfkd.batch import IGNORE
from hfkd.errors import VocabularyError
from hfkd.losses import LOSSES, Divergence, TokenLoss
from hfkd.objective import Objective, build_objective
from hfkd.rows import DenseRows, Head, RowLayout, TopKRows
from hfkd.schedules import Schedule, in_words
from hfkd.signal import TeacherSignal
from hfkd.support import TokenChunk
from hfkd.terms import Term, loss_class

N, WIDTH, VOCABULARY = 11, 6, 384


class Mean(Divergence):
    """The commonest slip in a loss of one's own."""

    def between(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """One number for all rows."""
        return (student - teacher).pow(2).mean()


def test_a_loss_must_say_something_of_each_row():
    """One number for a whole chunk counts as often as there are chunks: the result changes with a setting for
    memory.
    """
    world = World()
    with pytest.raises(ValueError, match=r"'mean' returned a tensor of shape \[\] for \d+ tokens; expected one"):
        Objective([Term("mean", Mean())])(world.student, world.dense, world.targets)


class World:
    """Student and teacher rows, and what an objective makes of them.

    Args:
        student_ids: Ids that the student scores.
        teacher_ids: Ids that the teacher scores.
    """

    def __init__(self, student_ids: int = VOCABULARY, teacher_ids: int = VOCABULARY) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(N, WIDTH, generator=generator).requires_grad_(True)
        self.weight = torch.randn(400, WIDTH, generator=generator)[:student_ids].clone().requires_grad_(True)
        self.theirs = torch.randn(N, WIDTH, generator=generator)
        self.their_weight = torch.randn(400, WIDTH, generator=generator)[:teacher_ids].clone()
        self.targets = torch.randint(380, (N,), generator=generator)

    @property
    def student(self) -> DenseRows:
        """The student's rows."""
        return DenseRows(self.hidden, Head(self.weight))

    @property
    def dense(self) -> TeacherSignal:
        """The teacher's rows."""
        return TeacherSignal(DenseRows(self.theirs, Head(self.their_weight)))

    def sparse(self, kept: int, temperature: float = 1.0) -> TeacherSignal:
        """The teacher's likeliest ids, in no order."""
        log_probs, ids = (self.theirs @ self.their_weight.T / temperature).log_softmax(-1).topk(kept, dim=-1)
        order = torch.randperm(kept, generator=torch.Generator().manual_seed(1))
        return TeacherSignal(TopKRows(ids[:, order], log_probs[:, order], self.their_weight.shape[0], temperature))

    def value(self, terms, signal: TeacherSignal | None = None, size: int | None = 4, **more) -> Tensor:
        """The total of an objective."""
        signal = self.dense if signal is None else signal
        return build_objective(terms, size)(self.student, signal, self.targets, **more).total

    def gradients(self, terms, signal: TeacherSignal | None = None, **more) -> tuple[Tensor, ...]:
        """The gradients of hidden states and head."""
        return torch.autograd.grad(self.value(terms, signal, **more), [self.hidden, self.weight])


# ------------------------------------------------------------------------------- recipe forms


def test_short_forms_are_the_long_form():
    """Prevents `loss: forward_kl` from being another loss than the list that it is short for."""
    world, loss = World(), LOSSES["forward_kl"]()
    forms = [
        "forward_kl",
        ["forward_kl"],
        {"kind": "forward_kl"},
        [{"kind": "forward_kl", "weight": 1.0, "temperature": 1.0}],
        loss,
        [Term("own name", loss)],
    ]
    values = {world.value(form).item() for form in forms}
    assert len(values) == 1 and values.pop() > 1
    assert [term.name for term in build_objective(forms[0]).terms] == ["forward_kl"]
    assert [term.name for term in build_objective(forms[-1]).terms] == ["own name"]


def test_a_ready_objective_is_returned_as_it_is():
    """Prevents a copy whose parameters the optimizer doesn't know."""
    objective = Objective("forward_kl", 3)
    assert build_objective(objective) is objective and objective.chunk_size == 3


def test_the_recipe_form_is_not_changed_by_reading_it():
    """Prevents a run record without the `kind` of its losses, because reading took it out."""
    spec = [{"kind": "forward_kl", "weight": 0.5, "name": "soft"}]
    build_objective(spec)
    assert spec == [{"kind": "forward_kl", "weight": 0.5, "name": "soft"}]


SPEC = [
    {"kind": "forward_kl", "weight": 0.5, "temperature": 2.0, "name": "soft"},
    {"kind": "forward_kl", "scale_by_temperature_squared": False, "temperature": 3.0, "name": "softer"},
    {"kind": "jensen_shannon", "mixture_weight": 0.2},
    {"kind": "sinkhorn", "mode": "sequence", "epsilon": 0.3, "weight": 2.0},
    {"kind": "cross_entropy", "weight": 0.1},
]


def test_a_description_rebuilds_the_objective():
    """Prevents a run record from which the loss can't be had again, number by number."""
    world, objective = World(), build_objective(SPEC)
    described = json.loads(json.dumps(objective.describe()))
    assert [term["name"] for term in described] == ["soft", "softer", "jensen_shannon", "sinkhorn", "cross_entropy"]
    assert build_objective(described).describe() == described
    assert world.value(described).item() == world.value(SPEC).item()


class Mine(Divergence):
    """A user's own loss, for the tests below."""

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n]."""
        return (student - teacher).square().mean(-1)


def test_the_description_of_a_loss_of_ones_own_rebuilds_it():
    """Prevents a run record, card or checkpoint that names a plug-in loss by a key that nobody can look up."""
    described = build_objective([{"kind": f"{__name__}:Mine", "temperature": 2.0}]).describe()
    assert build_objective(described).describe() == described


def test_terms_may_share_a_loss():
    """Prevents a loss that is used twice from counting once."""
    world, loss = World(), LOSSES["reverse_kl"]()
    once = world.value([Term("one", loss, 3.0)]).item()
    assert world.value([Term("one", loss, 1.0), Term("two", loss, 2.0)]).item() == pytest.approx(once, rel=1e-6)


def test_a_term_of_weight_zero_is_logged_and_teaches_nothing():
    """Prevents a loss that is only to be watched from moving the weights."""
    world = World()
    terms = ["forward_kl", {"kind": "cross_entropy", "weight": 0.0}]
    result = build_objective(terms)(world.student, world.dense, world.targets)
    assert result.parts["cross_entropy"].item() > 1
    assert result.total.item() == pytest.approx(result.parts["forward_kl"].item(), rel=1e-6)
    for ours, theirs in zip(world.gradients(terms), world.gradients("forward_kl"), strict=True):
        assert theirs.abs().max() > 1e-2
        torch.testing.assert_close(ours, theirs)


def test_needs_are_those_of_all_terms():
    """Prevents a teacher from being run for nothing, or not at all."""
    assert build_objective("cross_entropy").needs == frozenset()
    assert build_objective(["cross_entropy", "reverse_kl"]).needs == {"distribution"}


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ("foward_kl", "foward_kl.*Did you mean forward_kl"),
        ("jensen", "Did you mean.*jensen_shannon|Known:.*jensen_shannon"),
        ("zzz", "Known: cross_entropy.*package.module:Class"),
        ([{"kind": "forward_kl", "weight": -0.5}, "cross_entropy"], "-0.5.*none below 0"),
        ([{"kind": "forward_kl", "weight": 0}], "at least one above"),
        ([], "at least one above"),
        (["forward_kl", {"kind": "forward_kl", "temperature": 2.0}], "share a name.*forward_kl.*`name`"),
        ("sinkhorn", "sinkhorn.*stand alone.*alone: true"),
        (["sinkhorn", {"kind": "cross_entropy", "weight": 0.0}], "stand alone"),
        (["sinkhorn", {"kind": "sinkhorn", "name": "second"}], "stand alone"),
        ([{"kind": "forward_kl", "temperatur": 2.0}], "temperatur'.*Did you mean temperature"),
        pytest.param(
            [{"kind": "cross_entropy", "temperature": 2.0}],
            "cross_entropy has no setting 'temperature'",
        ),
        ([{"kind": "forward_kl", "temperature": 0.0}], "temperature is 0.0.*above 0"),
        ("hfkd.losses:LOSSES", "subclass of hfkd.losses.TokenLoss"),
        ("hfkd.losses:Missing", "hfkd.losses has no Missing"),
    ],
)
def test_impossible_recipes_are_refused_with_advice(terms, words):
    """Prevents a run of hours with another loss than the one that was meant."""
    with pytest.raises(ValueError, match=f"(?s){words}"):
        build_objective(terms)


@pytest.mark.parametrize("size", [0, -4])
def test_impossible_chunk_sizes_are_refused(size):
    """Prevents `chunk_size: 0` from being read as a wish for the default."""
    with pytest.raises(ValueError, match=f"chunk_size is {size}.*null"):
        build_objective("forward_kl", size)


def test_a_term_without_a_kind_is_refused_with_advice():
    """Prevents `KeyError: 'kind'` as the only word on a recipe."""
    with pytest.raises(ValueError, match="kind"):
        build_objective([{"weight": 1.0}])


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(weight):
    """Prevents a whole run of NaN from a weight that a script computed wrongly."""
    with pytest.raises(ValueError, match="weight"):
        build_objective(["cross_entropy", {"kind": "forward_kl", "weight": weight}])


def test_a_module_that_is_not_there_says_its_name():
    """Prevents a plug-in path from failing without the name that was looked for."""
    with pytest.raises(ValueError, match="no_such_module can't be imported"):
        build_objective("no_such_module:Loss")
    assert loss_class(f"{__name__}:Mine") is Mine


@pytest.mark.parametrize("wrong", ["teacher", "targets", "weights"])
def test_counts_of_rows_are_compared(wrong):
    """Prevents a student from being paired with the rows of other tokens; the message must say who has how many."""
    world = World()
    signal = (
        TeacherSignal(DenseRows(world.theirs[1:], Head(world.their_weight))) if wrong == "teacher" else world.dense
    )
    targets = world.targets[1:] if wrong == "targets" else world.targets
    weights = torch.ones(N - 1 if wrong == "weights" else N)
    with pytest.raises(ValueError, match=f"(?s)'{wrong}': 10.*labels of both views"):
        build_objective("forward_kl")(world.student, signal, targets, weights)


# ------------------------------------------------------------------------- padded vocabularies


@pytest.mark.parametrize(("student_ids", "teacher_ids"), [(384, 400), (400, 384)])
@pytest.mark.parametrize("terms", ["forward_kl", "reverse_kl", ["cross_entropy", "sinkhorn"]], ids=str)
def test_padding_of_the_vocabulary_changes_nothing(student_ids, teacher_ids, terms):
    """Prevents padding ids, which no tokenizer knows, from taking probability in one model and none in the other: the
    number is the one of both models cut to what they share.
    """
    world, cut = World(student_ids, teacher_ids), World()
    expected = cut.gradients(terms)
    assert world.value(terms).item() == pytest.approx(cut.value(terms).item(), rel=1e-5)
    for ours, theirs in zip(world.gradients(terms), expected, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=1e-4, atol=1e-5)
        assert not ours[len(theirs) :].any()  # a padding row of the head stays where it is
    uncut = World(400, 400)  # a guard: the padding would show
    uncut.their_weight = world.their_weight if teacher_ids == 400 else uncut.their_weight
    assert uncut.value(terms).item() != pytest.approx(cut.value(terms).item(), rel=1e-3)


@pytest.mark.parametrize(("student_ids", "teacher_ids"), [(384, 400), (400, 384)])
def test_a_target_that_only_one_model_knows_is_refused(student_ids, teacher_ids):
    """Prevents an index error on the device, or a token that is learned from a distribution without it."""
    world = World(student_ids, teacher_ids)
    world.value("forward_kl")
    world.targets[3] = 384
    with pytest.raises(
        VocabularyError, match=f"token id 384 .*first 384 ids.*student {student_ids}, teacher {teacher_ids}"
    ):
        world.value("forward_kl")


def test_without_a_teacher_the_student_keeps_its_whole_vocabulary():
    """Prevents cross-entropy from being cut to a teacher that isn't asked."""
    world = World(400)
    world.targets[3] = 399
    expected = nn.functional.cross_entropy(world.hidden @ world.weight.T, world.targets, reduction="sum")
    assert world.value("cross_entropy", TeacherSignal()).item() == pytest.approx(expected.item(), rel=1e-5)


# ----------------------------------------------------------------------------- sparse teachers

OTHERWISE = ("sinkhorn", "normalized_kd")
"""One compares rows, one is defined on sparse rows at temperature 1 only; other tests speak of them."""


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind, loss in LOSSES.items()
        if issubclass(loss, Divergence) and "temperature" in signature(loss).parameters and kind not in OTHERWISE
    ],
)
def test_all_ids_kept_is_the_dense_teacher(kind):
    """Prevents another loss for a cached teacher than for one in memory: with nothing left out they are the same."""
    world = World()
    terms = ["cross_entropy", {"kind": kind, "temperature": 1.5}]
    sparse = world.sparse(VOCABULARY, temperature=1.5)
    assert world.value(terms, sparse).item() == pytest.approx(world.value(terms).item(), rel=1e-5)
    for ours, theirs in zip(world.gradients(terms, sparse), world.gradients(terms), strict=True):
        assert theirs.abs().max() > 1e-2
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "total_variation", "jensen_shannon"])
def test_more_kept_ids_come_closer_to_the_dense_teacher(kind):
    """Prevents a tail that is dropped or renormalised: putting ids into one bucket can only hide a difference, never
    make one, so the value rises to the dense one.
    """
    world = World()
    values = [world.value(kind, world.sparse(kept)).item() for kept in (1, 2, 4, 16, 64, 256)]
    dense = world.value(kind).item()
    assert all(one < two + 1e-5 for one, two in zip(values, [*values[1:], dense], strict=True))
    assert 0 < values[0] < 0.9 * dense < values[-1] / 0.8


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            "reverse_kl",
        ),
        "forward_kl",
        "jensen_shannon",
        "skew_reverse_kl",
    ],
)
def test_a_tail_too_small_for_float32_is_not_taken_for_nothing(kind):
    """Prevents penalties of many nats that the dense teacher doesn't give, wherever a teacher is sure of itself: a
    bucket can only hide a difference.
    """
    world = World()
    world.their_weight *= 3.0
    dense = world.value(kind).item()
    assert all(world.value(kind, world.sparse(kept)).item() < 1.001 * dense for kept in (64, 128, 256, 320))


def test_rows_that_are_compared_need_one_support():
    """Prevents a transport cost between a student's probability of one id and a teacher's of another: with all ids
    kept it must be the dense one, or be refused.
    """
    world, terms = World(), [{"kind": "sinkhorn", "alone": True}]
    try:
        value = world.value(terms, world.sparse(VOCABULARY)).item()
    except ValueError:
        return
    assert value == pytest.approx(world.value(terms).item(), rel=1e-5)


def test_a_sparse_teacher_that_agrees_costs_nothing():
    """Prevents a tail whose mass is off from pushing a student that already says what the teacher says."""
    world = World()
    world.theirs, world.their_weight = world.hidden.detach().clone(), world.weight.detach().clone()
    for kept in (1, 8, VOCABULARY):
        assert abs(world.value("forward_kl", world.sparse(kept)).item()) < 1e-4
        assert all(gradient.abs().max() < 1e-4 for gradient in world.gradients("forward_kl", world.sparse(kept)))


def test_a_sparse_teacher_of_another_temperature_is_refused():
    """Prevents cached rows from being read at a temperature that they weren't taken at."""
    world = World()
    with pytest.raises(ValueError, match="temperature 2.0.*temperature 1.0"):
        world.value([{"kind": "forward_kl", "temperature": 2.0}], world.sparse(8))


def test_a_sparse_teacher_of_a_narrower_vocabulary_cuts_the_student():
    """Prevents a cached teacher from giving another number than the same teacher in memory, where the student's head
    is padded.
    """
    world = World(student_ids=400)
    sparse = world.sparse(VOCABULARY)
    assert world.value("forward_kl", sparse).item() == pytest.approx(world.value("forward_kl").item(), rel=1e-5)


def test_a_sparse_teacher_of_a_wider_vocabulary_is_cut_or_refused():
    """Prevents an index error (on a GPU, an assert that takes the process down) for a padding id among the top-k."""
    world = World(teacher_ids=400)
    world.their_weight[390] = 5.0 * world.theirs[2]
    try:
        value = world.value("forward_kl", world.sparse(8))
    except VocabularyError:
        return
    assert torch.isfinite(value)


# --------------------------------------------------------------------------------- small print


def test_weights_of_nothing_are_rows_that_are_not_there():
    """Prevents token weights from being normalised away, or from reaching value and gradient differently."""
    world = World()
    weights = torch.ones(N)
    weights[[1, 4, 5]] = 0.0
    hidden, _ = world.gradients("forward_kl", weights=weights)
    kept = weights > 0
    fewer = build_objective("forward_kl")(
        DenseRows(world.hidden[kept], Head(world.weight)),
        TeacherSignal(DenseRows(world.theirs[kept], Head(world.their_weight))),
        world.targets[kept],
    ).total
    assert world.value("forward_kl", weights=weights).item() == pytest.approx(fewer.item(), rel=1e-5)
    assert not hidden[~kept].any() and hidden[kept].abs().max() > 1e-2
    doubled = world.gradients("forward_kl", weights=2 * weights)[0]
    torch.testing.assert_close(doubled, 2 * hidden)


def test_without_a_layout_all_rows_are_one_sequence():
    """Prevents rows from becoming strangers to each other because no layout was given."""
    world = World()
    terms = [{"kind": "sinkhorn", "mode": "sequence", "alone": True}]
    single = world.value(terms, layout=RowLayout.single(N, torch.device("cpu"))).item()
    labels = torch.full((N, 2), IGNORE)
    labels[:, 1] = 5
    assert world.value(terms).item() == single != world.value(terms, layout=RowLayout.of(labels)).item()


@pytest.mark.parametrize("terms", ["forward_kl", SPEC], ids=["one", "several"])
def test_no_rows_cost_nothing_and_still_go_backward(terms):
    """Prevents a fully masked micro-batch from breaking a step, or from keeping other processes waiting."""
    world = World()
    total = build_objective(terms)(
        DenseRows(world.hidden[:0], Head(world.weight)),
        TeacherSignal(DenseRows(world.theirs[:0], Head(world.their_weight))),
        world.targets[:0],
        measure_agreement=True,
    )
    assert total.total.item() == 0.0 and total.tokens == 0 and int(total.agreed) == 0
    total.total.backward()
    assert world.weight.grad.shape == world.weight.shape and not world.weight.grad.any()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_makes_no_graph(context):
    """Prevents evaluation from holding gradient buffers of the head's size, or from giving another number."""
    world = World()
    expected = build_objective(SPEC, 4)(world.student, world.dense, world.targets)
    with context():
        result = build_objective(SPEC, 4)(world.student, world.dense, world.targets)
    assert not result.total.requires_grad
    assert result.total.item() == expected.total.item()
    assert {name: part.item() for name, part in result.parts.items()} == {
        name: part.item() for name, part in expected.parts.items()
    }


def test_parts_are_sums_before_their_weights():
    """Prevents logged parts that can't be compared between runs with other weights."""
    world = World()
    result = build_objective(SPEC)(world.student, world.dense, world.targets)
    weights = [0.5, 1.0, 1.0, 2.0, 0.1]
    total = sum(weight * part.item() for weight, part in zip(weights, result.parts.values(), strict=True))
    assert result.total.item() == pytest.approx(total, rel=1e-5)
    alone = world.value([{"kind": "forward_kl", "temperature": 2.0}]).item()
    assert result.parts["soft"].item() == pytest.approx(alone, rel=1e-5)
    assert result.tokens == N


class Learned(TokenLoss):
    """A loss with a parameter of its own and nothing else that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(0.7))

    def forward(self, chunk: TokenChunk) -> Tensor:
        """Return [n]."""
        return -self.sharpness.square() * chunk.target_log_probs()


@pytest.mark.parametrize("size", [1, 4, None])
def test_a_loss_learns_where_nothing_else_does(size):
    """Prevents the parameters of a loss from being forgotten where student and head are frozen."""
    world = World()
    cost = -(world.hidden @ world.weight.T).detach().log_softmax(-1)[torch.arange(N), world.targets].sum()
    world.hidden.requires_grad_(False)
    world.weight.requires_grad_(False)
    loss = Learned()
    world.value([Term("own", loss, 0.5)], size=size).backward()
    assert loss.sharpness.grad.item() == pytest.approx(0.5 * 2 * 0.7 * cost.item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 4, None])
def test_company_does_not_touch_a_losss_own_parameter(size):
    """Prevents a grouping or another term from adding to the gradient of a parameter that isn't theirs."""
    world, gradients = World(), []
    for company in ([], ["forward_kl", {"kind": "sinkhorn", "group_size": 3}]):
        loss = Learned()
        world.value([Term("own", loss), *company], size=size).backward()
        gradients.append(loss.sharpness.grad.item())
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-5) and abs(gradients[0]) > 1


@pytest.mark.parametrize("kind", ["hidden_mse", "relation", "hinge_ranking", "span_correlation"])
def test_a_term_that_says_too_little_may_not_stand_alone(kind):
    """Prevents a run whose output head learns nothing, and an error that doesn't say why it was refused."""
    with pytest.raises(ValueError, match=rf"{kind}.*would stand alone, but .*Add a term such as forward_kl"):
        Objective(kind)


def test_weights_that_fade_to_nothing_are_refused():
    """Prevents a run in which no term ever counts, because its author swapped two numbers of a schedule."""
    nothing = {"schedule": "linear", "start": 0.0, "end": 0.0}
    with pytest.raises(ValueError, match="at least one above"):
        Objective([{"kind": "forward_kl", "weight": nothing}])


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"schedule": "linear", "start": 1.0, "end": 0.0, "start_step": 9, "end_step": 3}, "ends at step 3"),
        ({"schedule": "wave", "start": 1.0, "end": 0.0}, "'wave'; expected one of linear, cosine, step"),
        ({"schedule": "linear", "begin": 1.0, "end": 0.0}, "keys schedule, start, end, start_step, end_step"),
        ({"schedule": "cosine", "start": "high", "end": 0.0}, "two finite numbers"),
        ({"schedule": "stairs", "start": 1.0, "end": 0.5}, "'stairs' with stairs None; expected both or neither"),
        ({"schedule": "linear", "start": 1.0, "end": 0.5, "stairs": 4}, "'linear' with stairs 4"),
        ({"schedule": "stairs", "start": 1.0, "end": 0.5, "stairs": 1}, "1 stairs; expected a whole number"),
        ({"schedule": "stairs", "start": 1.0, "end": 0.5, "stairs": 2.5}, "2.5 stairs"),
        ({"schedule": "stairs", "start": 1.0, "end": 0.5, "stairs": 9, "end_step": 8}, "9 stairs for 8 steps"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_by_the_name_of_its_term(schedule, words):
    """Prevents a schedule that is over before it starts."""
    for term in ({"weight": schedule}, {"temperature": schedule}):
        with pytest.raises(ValueError, match=words) as caught:
            Objective([{"kind": "forward_kl", **term}])
        assert "forward_kl" in str(caught.value)


def test_a_temperature_that_falls_to_zero_is_refused():
    """Prevents a division by zero at the last step of a run."""
    with pytest.raises(ValueError, match="forward_kl: temperature is .*expected a number above 0"):
        Objective([{"kind": "forward_kl", "temperature": {"schedule": "linear", "start": 2.0, "end": 0.0}}])


def test_stairs_are_equal_and_the_last_has_the_end():
    """Prevents a weight of the previous epoch that is a step too early or never as large as it was asked to be."""
    climbing = Schedule("stairs", start=0.0, end=0.8, stairs=5)
    seen = [climbing.at(step, total=20) for step in range(20)]
    assert seen == pytest.approx([0.0] * 4 + [0.32] * 4 + [0.48] * 4 + [0.64] * 4 + [0.8] * 4)
    falling = Schedule("stairs", start=1.0, end=0.2, stairs=5)
    assert [falling.at(step, total=20) for step in range(20)] == pytest.approx([1 - share for share in seen])
    later = Schedule("stairs", start=0.0, end=1.0, stairs=2, start_step=2, end_step=6)
    assert [later.at(step) for step in range(8)] == [0.0] * 4 + [1.0] * 4
    uneven = [climbing.at(step, total=7) for step in range(7)]
    assert uneven == pytest.approx([0.0, 0.0, 0.32, 0.48, 0.48, 0.64, 0.8])
    with pytest.raises(ValueError, match="5 stairs for 4 steps"):
        climbing.at(0, total=4)
    with pytest.raises(ValueError, match="an unknown number of steps"):
        climbing.at(0)


@pytest.mark.parametrize("total", [5, 6, 7, 12, 20, 101])
@pytest.mark.parametrize(("start_step", "end_step"), [(0, None), (0, 5), (3, 19)])
@pytest.mark.parametrize("stairs", [2, 3, 5])
def test_a_staircase_turns_where_it_says(total, start_step, end_step, stairs):
    """Prevents a step without anything to learn from that the look before training leaves out."""
    for ends in ((0.0, 1.0), (1.0, 0.0), (0.2, 0.8)):
        schedule = Schedule("stairs", *ends, start_step=start_step, end_step=end_step, stairs=stairs)
        seen = [schedule.at(step, total) == 0 for step in range(total)]
        changes = {step for step in range(1, total) if seen[step] != seen[step - 1]}
        turns = set(schedule.turns(total))
        assert changes <= turns and {step - 1 for step in changes} <= turns and {0, total - 1} <= turns


def test_a_staircase_that_begins_with_nothing_needs_company():
    """Prevents a first epoch in which nothing is learned."""
    climb = {"schedule": "stairs", "stairs": 3, "start": 0.0, "end": 1.0}
    with pytest.raises(ValueError, match=r"At step 1 of 9: The weights are \[0.0\]"):
        Objective([{"kind": "forward_kl", "weight": climb}]).check_schedules(9)
    both = Objective([{"kind": "forward_kl", "weight": climb}, {"kind": "cross_entropy", "weight": 0.1}])
    both.check_schedules(9)
    assert both.describe()[0]["weight"] == {**climb, "start_step": 0, "end_step": None}
    plain = Schedule("linear", 1.0, 0.0).describe()
    assert "stairs" not in plain and Schedule(**plain) == Schedule("linear", 1.0, 0.0)


def test_a_staircase_is_said_in_words():
    """Prevents a card on which a growing weight reads like a constant one."""
    words = in_words(Schedule("stairs", start=0.0, end=0.8, stairs=5).describe())
    assert words == "(5 stairs, 0 to 0.8 by the last step)"
