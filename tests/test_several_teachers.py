"""Several teachers in the place of one: mixtures against their definition, routes against each teacher alone, and what
is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model, make_tokenizer
from datasets import Dataset
from test_prefix import view_of
from test_teachers import LONG, NEEDS, Words, student
from torch import Tensor, nn
from training import ROWS, lora, make_trainer, run, worst_difference

from hfkd.batch import Batch
from hfkd.data.collate import DistillationCollator
from hfkd.data.load import Source, load_rows
from hfkd.data.prompts import PromptBuilder, PromptStyle
from hfkd.data.views import DistillationDataset
from hfkd.errors import VocabularyError
from hfkd.objective import Objective
from hfkd.recipe import load_recipe
from hfkd.rows import DenseRows, Head, TopKRows
from hfkd.run.build import build
from hfkd.run.models import make_teacher
from hfkd.signal import STATES, TeacherSignal
from hfkd.teacher_rows import MixtureRows, RoutedRows
from hfkd.teachers import LocalTeacher, SelfTeacher, Teacher
from hfkd.teachers.moving import EmaTeacher
from hfkd.teachers.several import MixtureTeacher, RoutedTeacher

RESTS = [([5, 6, 7], [40, 41]), ([8], [42, 43, 44]), ([9] * 9, [45]), ([11], [46, 47]), ([12, 13], [48]), ([14], [49])]
ROUTE = torch.tensor([1, 0, 1, 1, 0, 1])
SHARES = {"a": 1.0, "b": 3.0}
NAMED = [{**row, "teacher": "ab"[place % 3 == 0]} for place, row in enumerate(ROWS[:16])]


class Heard(Teacher):
    """Notes what it is told, and says whatever rows it was given."""

    def __init__(self, rows: Any = None, state: dict[str, Tensor] | None = None) -> None:
        self.rows, self.state, self.told = rows, state or {}, []

    def signal(self, batch: Batch, needs: frozenset[str]) -> TeacherSignal:
        self.told.append(("signal", batch))
        return TeacherSignal(self.rows)

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        self.told.append("prepare")

    def share_prefix(self, ids: Sequence[int]) -> None:
        self.told.append(("share_prefix", list(ids)))

    def meet(self, dataset: DistillationDataset, training: bool = True) -> None:
        self.told.append(("meet", training))

    def after_step(self, step: int) -> None:
        self.told.append(("after_step", step))

    def after_epoch(self, epoch: float) -> None:
        self.told.append(("after_epoch", epoch))

    def state_dict(self) -> dict[str, Tensor]:
        return self.state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.state = state


class Counted(LocalTeacher):
    """Counts the rows that it reads, and the columns that it reads them in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.read: list[tuple[int, int]] = []

    def signal(self, batch: Batch, needs: frozenset[str]) -> TeacherSignal:
        self.read.append(tuple(batch.teacher_view.input_ids.shape))
        return super().signal(batch, needs)


def two(kind: type[LocalTeacher] = LocalTeacher, **overrides: Any) -> dict[str, LocalTeacher]:
    """Two teachers of different weights."""
    return {"a": kind(make_model(seed=1, **overrides)), "b": kind(make_model(seed=2))}


def prepared(teacher: Teacher) -> Teacher:
    """On the CPU, beside some student."""
    teacher.prepare(Accelerator(cpu=True), student())
    return teacher


def rows_like(count: int, vocab_size: int, seed: int, width: int = 6) -> DenseRows:
    """[N, H] random rows with a head of their own, in float64."""
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=make, dtype=torch.float64)
    return DenseRows(hidden, Head(torch.randn(vocab_size, width, generator=make, dtype=torch.float64)))


def mixed(members: Sequence[DenseRows], shares: Sequence[float], size: int) -> Tensor:
    """[N, V] the log of the weighted sum of the softmaxes, as it is written."""
    parts = [torch.softmax(rows.head.logits(rows.hidden)[:, :size], dim=-1) for rows in members]
    return sum(share * part for share, part in zip(shares, parts, strict=True)).log()


def said(rows: Any) -> Tensor:
    """[N, V] log-probabilities of whatever rows."""
    if isinstance(rows, DenseRows):
        return torch.log_softmax(rows.head.logits(rows.hidden), dim=-1)
    buffer = torch.empty(len(rows), rows.vocab_size, dtype=rows.members[0].hidden.dtype)
    return torch.log_softmax(rows.detached().logits(slice(None), buffer), dim=-1)


def batch_of(side: str = "right", route: Tensor | None = None) -> Batch:
    """Six rows of very different lengths; the teacher reads them behind demonstrations."""
    return Batch(view_of(side, [4], RESTS), view_of(side, LONG, RESTS), route=route)


def value_and_gradient(kind: str, size: int, teacher: Any, learner: DenseRows, **options: Any) -> tuple[Tensor, ...]:
    """What an objective says of rows, and how it moves the student's hidden states and head."""
    hidden = learner.hidden.clone().requires_grad_()
    weight = learner.head.weight.clone().requires_grad_()
    targets = torch.arange(len(learner)) % 5
    objective = Objective([{"kind": kind, **options}], chunk_size=size)
    total = objective(DenseRows(hidden, Head(weight)), TeacherSignal(teacher), targets).total
    total.backward()
    assert hidden.grad.abs().max() > 0 and weight.grad.abs().max() > 0
    return total.detach(), hidden.grad, weight.grad


# ---------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("sizes", [(11, 11, 11), (11, 14, 12), (16, 11, 13)], ids=["same", "teachers", "student"])
@pytest.mark.parametrize("chunk", [1, 5, 7])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_mixture_is_the_weighted_sum_of_softmaxes(sizes, chunk, temperature):
    """Prevents a mean of logits, weights that are counted twice, padded ids that take mass, and chunks that mix
    rows.
    """
    learner, first, second = (rows_like(7, size, seed) for seed, size in enumerate(sizes))
    shared, shares = min(sizes), (0.3, 0.7)
    found = value_and_gradient(
        "forward_kl", chunk, MixtureRows((first, second), shares), learner, temperature=temperature
    )
    hidden, weight = learner.hidden.clone().requires_grad_(), learner.head.weight.clone().requires_grad_()
    theirs = torch.log_softmax(mixed((first, second), shares, shared) / temperature, dim=-1)
    ours = torch.log_softmax((hidden @ weight.T)[:, :shared] / temperature, dim=-1)
    expected = temperature**2 * (theirs.exp() * (theirs - ours)).sum()
    expected.backward()
    for value, wanted in zip(found, (expected.detach(), hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)


def test_a_teacher_mixed_with_itself_is_that_teacher():
    """Prevents a mixture that sharpens or flattens."""
    learner, alone = rows_like(7, 11, 0), rows_like(7, 11, 1)
    for kind in ("forward_kl", "reverse_kl", "jensen_shannon"):
        expected = value_and_gradient(kind, 3, alone, learner)
        found = value_and_gradient(kind, 3, MixtureRows((alone, alone), (0.2, 0.8)), learner)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("share", [False, True], ids=["whole", "prefix"])
def test_a_mixture_asks_every_teacher(side, share):
    """Prevents a member that is forgotten, or reads another view than alone."""
    teachers, batch = two(), batch_of(side)
    mixture = prepared(MixtureTeacher(teachers, SHARES))
    if share:
        mixture.share_prefix(LONG)
    rows = mixture.signal(batch, NEEDS).rows
    alone = [teacher.signal(batch, NEEDS).rows for teacher in teachers.values()]
    assert isinstance(rows, MixtureRows) and rows.weights == (0.25, 0.75) and len(rows) == batch.student.tokens
    torch.testing.assert_close(said(rows), mixed(alone, (0.25, 0.75), 384), rtol=1e-4, atol=1e-4)
    assert (said(rows) - said(alone[0])).abs().max() > 0.1
    assert all((one.prefix is not None and one.prefix._cache is not None) == share for one in teachers.values())


def test_weights_are_scaled_and_belong_to_names():
    """Prevents weights that follow the order of a file, or that change the size of the loss."""
    teachers = two()
    there = MixtureTeacher(teachers, {"a": 2.0, "b": 6})
    back = MixtureTeacher({"b": teachers["b"], "a": teachers["a"]}, {"a": 1.0, "b": 3.0})
    assert there.shares == {"a": 0.25, "b": 0.75} == back.shares
    assert MixtureTeacher(teachers).shares == {"a": 0.5, "b": 0.5}
    batch = batch_of()
    ours, theirs = (said(prepared(one).signal(batch, NEEDS).rows) for one in (there, back))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"a": 1.0}, r"weights are those of \['a'\].*teachers are \['a', 'b'\]"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "'c'"),
        ({"a": 1.0, "b": 0.0}, "'b' is 0.0; expected a finite number above 0"),
        ({"a": 1.0, "b": -1.0}, "'b' is -1.0"),
        ({"a": float("inf"), "b": 1.0}, "'a' is inf"),
        ({"a": float("nan"), "b": 1.0}, "'a' is nan"),
        ({"a": True, "b": 1.0}, "'a' is True"),
        ({"a": "2", "b": 1.0}, "'a' is '2'"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights, words):
    """Prevents a teacher that is paid for and doesn't count, and losses that are not numbers."""
    with pytest.raises(ValueError, match=words):
        MixtureTeacher(two(), weights)


def test_members_keep_their_own_precision():
    """Prevents a large bfloat16 teacher from being widened because another one is float32."""
    teachers = {"a": LocalTeacher(make_model(seed=1).bfloat16()), "b": LocalTeacher(make_model(seed=2))}
    mixture, batch = prepared(MixtureTeacher(teachers)), batch_of()
    rows = mixture.signal(batch, NEEDS).rows
    assert [member.hidden.dtype for member in rows.members] == [torch.bfloat16, torch.float32]
    learner = DenseRows(torch.randn(len(rows), 32), Head(torch.randn(384, 32)))
    value, *_ = value_and_gradient("forward_kl", 4, rows, learner)
    wide = [DenseRows(member.hidden.float(), Head(member.head.weight.float())) for member in rows.members]
    expected, *_ = value_and_gradient("forward_kl", 4, MixtureRows(tuple(wide), (0.5, 0.5)), learner)
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)


# ------------------------------------------------------------------------------------------ routes


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("share", [False, True], ids=["whole", "prefix"])
@pytest.mark.parametrize("order", [list(range(6)), [4, 2, 0, 5, 1, 3]], ids=["in order", "shuffled"])
def test_each_row_is_taught_by_the_teacher_that_it_names(side, share, order):
    """Prevents rows that are put back in another order, or read by the neighbour's teacher."""
    teachers = two()
    rests, route = [RESTS[place] for place in order], ROUTE[order]
    batch = Batch(view_of(side, [4], rests), view_of(side, LONG, rests), route=route)
    routed = prepared(RoutedTeacher(teachers))
    if share:
        routed.share_prefix(LONG)
    rows = routed.signal(batch, NEEDS).rows
    assert isinstance(rows, RoutedRows) and len(rows) == batch.student.tokens
    names, place = list(teachers), 0
    for rest, number in zip(rests, route.tolist(), strict=True):
        one = Batch(view_of(side, [4], [rest]), view_of(side, LONG, [rest]))
        expected = said(prepared(teachers[names[number]]).signal(one, NEEDS).rows)
        other = said(prepared(teachers[names[1 - number]]).signal(one, NEEDS).rows)
        found = said(rows)[place : place + len(rest[1])]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found - other).abs().max() > 0.1
        place += len(rest[1])
    assert place == len(rows)


@pytest.mark.parametrize("chunk", [1, 5, 10])
def test_a_routed_loss_is_the_sum_of_the_teachers_own(chunk):
    """Prevents a gradient that mixes rows of different teachers within a chunk."""
    owner = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1, 0, 1])
    learner, first, second = (rows_like(10, 11, seed) for seed in range(3))
    place = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4, 3, 5])
    parts = tuple(DenseRows(rows.hidden[owner == number], rows.head) for number, rows in enumerate((first, second)))
    found = value_and_gradient("reverse_kl", chunk, RoutedRows(parts, owner, place), learner)
    values, gradients, heads = [], torch.zeros_like(learner.hidden), torch.zeros_like(learner.head.weight)
    for number, rows in enumerate(parts):
        own = DenseRows(learner.hidden[owner == number], learner.head)
        value, gradients[owner == number], head = value_and_gradient("reverse_kl", chunk, rows, own)
        values.append(value)
        heads += head
    for ours, theirs in zip(found, (sum(values), gradients, heads), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_teacher_without_rows_is_not_run():
    """Prevents paying for every teacher in each batch, and padding that only other teachers' rows need."""
    teachers = two(Counted)
    routed = prepared(RoutedTeacher(teachers))
    batch = batch_of(route=torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(said(routed.signal(batch, NEEDS).rows), said(teachers["a"].signal(batch, NEEDS).rows))
    assert teachers["b"].read == [] and teachers["a"].read[0][0] == 6
    second = said(routed.signal(batch_of(route=torch.ones(6, dtype=torch.long)), NEEDS).rows)
    torch.testing.assert_close(second, said(teachers["b"].signal(batch, NEEDS).rows))
    routed.signal(batch_of(route=ROUTE), NEEDS)
    assert teachers["a"].read[-1] == (2, len(LONG) + 4) and teachers["b"].read[-1] == (4, len(LONG) + 10)


def test_the_neighbours_of_a_row_do_not_change_its_vocabulary():
    """Prevents a loss that depends on how rows are batched, where vocabularies are padded to different sizes."""
    teachers = two(vocab_size=380)
    routed = prepared(RoutedTeacher(teachers))
    alone = routed.signal(batch_of(route=torch.ones(6, dtype=torch.long)), NEEDS).rows
    beside = routed.signal(batch_of(route=ROUTE), NEEDS).rows
    assert alone.vocab_size == beside.vocab_size == 380


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_route_travels_with_its_rows(side):
    """Prevents a route that is lost between the data set and the teacher, or that stays behind when rows are
    shuffled.
    """
    data = dataset_of(NAMED)
    collator = DistillationCollator(2, side)
    picked = [3, 5, 0, 10]
    inputs = collator([data[place] for place in picked])
    assert inputs["route"].dtype == torch.long and inputs["route"].shape == (4,)
    assert inputs["route"].tolist() == [int(place % 3 == 0) for place in picked]
    assert Batch.from_inputs(inputs).route.tolist() == inputs["route"].tolist()
    assert "route" not in collator([dataset_of(NAMED, None)[0]])
    half = [data[0], {key: value for key, value in data[1].items() if key != "route"}]
    with pytest.raises(ValueError, match="example 1 has no 'route'"):
        collator(half)


def dataset_of(rows: list[dict], route: Any = ("teacher", ("a", "b"))) -> DistillationDataset:
    """The views of some rows."""
    return DistillationDataset(rows, PromptBuilder(make_tokenizer(), PromptStyle()), route=route)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"teacher": "c"}, "training row 1: its column 'teacher' names the teacher 'c'; known teachers are a, b"),
        ({"teacher": " a"}, "training row 1: .*' a'"),
        ({"teacher": 0}, "training row 1: .*teacher 0"),
        ({"teacher": None}, "training row 1: its column 'teacher' is empty.*known teachers are a, b"),
        ({"teacher": ""}, "training row 1: .*is empty"),
        ({}, "training row 1: it has no column 'teacher'.*completion.*prompt.*known teachers are a, b"),
    ],
)
def test_a_row_whose_teacher_is_not_known_is_named(row, words):
    """Prevents a misspelt name from being found hours into a run, or taught by whoever comes first."""
    good = {"prompt": "walk", "completion": "walked", "teacher": "a"}
    bad = {"prompt": "go", "completion": "went", **row}
    with pytest.raises(ValueError, match=words):
        dataset_of([good, bad])
    assert [dataset_of([good, bad], None)[place].get("route") for place in range(2)] == [None, None]


@pytest.mark.parametrize("route", [("teacher", ()), ("teacher", "ab"), ("teacher", ["a", "a"])])
def test_a_route_without_names_is_refused(route):
    """Prevents a text of names from being read letter by letter."""
    with pytest.raises(ValueError, match="expected a column and the names"):
        dataset_of(NAMED, route)


def test_the_column_arrives_from_a_file(tmp_path):
    """Prevents a loader that leaves the teacher's name behind; numbers are names too."""
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion,expert\nwalk,walked,1\nsing,sang,2\n")
    rows = load_rows(Source(str(file), columns={"teacher": "expert"}))
    assert rows["teacher"] == ["1", "2"]
    assert [example["route"] for example in dataset_of(list(rows), ("teacher", ("2", "1")))] == [1, 0]
    with pytest.raises(ValueError, match="maps 'teacher' to 'exprt', which isn't there; did you mean expert"):
        load_rows(Source(str(file), columns={"teacher": "exprt"}))
    assert "teacher" not in load_rows(Source(str(file))).column_names


@pytest.mark.parametrize(
    ("route", "words"),
    [
        (None, "doesn't say which teacher.*'teacher', \\('a', 'b'\\)"),
        (torch.tensor([0, 1, 2, 0, 1, 0]), "0 to 1"),
        (torch.tensor([0, -1, 1, 0, 1, 0]), "0 to 1"),
        (torch.tensor([0, 1]), r"\[0, 1\] for 6 rows"),
    ],
    ids=["none", "above", "below", "short"],
)
def test_a_batch_that_routes_nowhere_is_refused(route, words):
    """Prevents a collator of one's own from routing rows to the wrong teacher in silence."""
    with pytest.raises(ValueError, match=words):
        prepared(RoutedTeacher(two())).signal(batch_of(route=route), NEEDS)


def test_data_that_name_other_teachers_are_refused():
    """Prevents numbers that were counted in another order of the names."""
    routed = RoutedTeacher(two())
    routed.meet(dataset_of(NAMED))
    assert routed.route == ("teacher", ("a", "b"))
    for route in (None, ("teacher", ("b", "a")), ("expert", ("a", "b"))):
        rows = [{**row, "expert": row["teacher"]} for row in NAMED]
        with pytest.raises(ValueError, match="route=teacher.route"):
            routed.meet(dataset_of(rows, route))


# ------------------------------------------------------------------------------------ what both do


@pytest.mark.parametrize("kind", [MixtureTeacher, RoutedTeacher])
def test_members_hear_everything_once(kind):
    """Prevents a moving member that stands still, or that moves twice because it has two names."""
    first, second = Heard(), Heard()
    several = kind({"a": first, "b": second, "again": first})
    several.prepare(Accelerator(cpu=True), make_model())
    several.share_prefix([1, 2])
    several.meet(dataset_of(NAMED, ("teacher", ("a", "b", "again"))), training=False)
    several.after_step(3)
    several.after_epoch(1.0)
    expected = ["prepare", ("share_prefix", [1, 2]), ("meet", False), ("after_step", 3), ("after_epoch", 1.0)]
    assert first.told == expected == second.told


@pytest.mark.parametrize("kind", [MixtureTeacher, RoutedTeacher])
def test_states_are_kept_apart_by_name(kind):
    """Prevents two moving members from overwriting each other in a checkpoint."""
    states = {"a": {"x": torch.ones(2), "deep.x": torch.zeros(1)}, "b": {}, "c": {"x": torch.full((2,), 3.0)}}
    saved = kind({name: Heard(state=dict(state)) for name, state in states.items()}).state_dict()
    assert saved.keys() == {"a.x", "a.deep.x", "c.x"}
    blank = {"a": Heard(state={"x": torch.zeros(2)}), "b": Heard(), "c": Heard(state={"x": torch.zeros(2)})}
    kind(blank).load_state_dict(saved)
    for name, member in blank.items():
        assert member.state.keys() == states[name].keys()
        assert all(torch.equal(member.state[key], value) for key, value in states[name].items())
    with pytest.raises(ValueError, match=r"states of the teachers \['a'\].*\['a', 'c'\]"):
        kind(blank).load_state_dict({"a.x": torch.ones(2)})
    with pytest.raises(ValueError, match="'other'"):
        kind(blank).load_state_dict({**saved, "other.x": torch.ones(2)})


@pytest.mark.parametrize("kind", [MixtureTeacher, RoutedTeacher])
def test_rows_in_another_form_are_refused(kind):
    """Prevents top-k rows from being read as hidden states, and a mixture of unlike supports."""
    batch = batch_of(route=torch.ones(6, dtype=torch.long))
    sparse = TopKRows(torch.zeros(10, 1, dtype=torch.long), torch.zeros(10, 1), 384)
    several = kind({"a": LocalTeacher(make_model(seed=1)), "cached": Heard(sparse)})
    with pytest.raises(ValueError, match="'cached' .Heard. gives TopKRows.*--codec hidden"):
        prepared(several).signal(batch, NEEDS)
    short = DenseRows(torch.zeros(3, 32), Head(torch.zeros(384, 32)))
    several = kind({"a": LocalTeacher(make_model(seed=1)), "short": Heard(short)})
    with pytest.raises(ValueError, match="'short' .Heard. gives 3 rows for 10"):
        prepared(several).signal(batch, NEEDS)


@pytest.mark.parametrize("kind", [MixtureTeacher, RoutedTeacher])
def test_states_and_answers_are_refused(kind):
    """Prevents losses on states of nobody in particular, and a corpus written by one of the teachers alone."""
    several = kind(two())
    assert STATES not in several.provides
    several.keep_states([])
    with pytest.raises(TypeError, match=f"{kind.__name__} shows no hidden states"):
        several.keep_states([1])
    with pytest.raises(TypeError, match=r"members \['a', 'b'\].*can't write one answer.*answer: dataset"):
        several.weights()
    only = kind({"a": LocalTeacher(model := make_model(seed=1))})
    with only.weights() as found:
        assert found is model


def test_who_can_write_and_who_begins_as_the_student():
    """Prevents a run that finds at its first step of the teacher's that nobody can write, or never that all agree."""
    shared, own = LocalTeacher(make_model(seed=1)), {"a": EmaTeacher(), "b": SelfTeacher("frozen_copy")}
    assert MixtureTeacher({"a": shared}).writes and RoutedTeacher({"a": shared, "b": shared}).writes
    with RoutedTeacher({"a": shared, "b": shared}).weights() as model:
        assert model is shared.model
    assert not MixtureTeacher({"a": Heard()}).writes and not RoutedTeacher(two()).writes
    assert MixtureTeacher(own).begins_as_student and not MixtureTeacher({**own, "c": shared}).begins_as_student


def test_a_routed_member_without_a_model_speaks_beside_one_that_has_one():
    """Prevents a teacher of the user's own, with the one method that is asked of it, from ending a run midway."""

    class Plain(Heard):
        def signal(self, batch, needs):
            return TeacherSignal(rows_like(batch.teacher_view.tokens, 390, seed=3))

    view = view_of(rests=RESTS)
    model = make_model(seed=1)
    with_model = prepared(RoutedTeacher({"a": LocalTeacher(model), "b": Plain()}))
    size = Head.of(model).vocab_size
    found = with_model.signal(Batch(view, route=ROUTE), NEEDS).rows
    assert found.vocab_size == min(size, 390) and len(found) == view.tokens
    alone = with_model.signal(Batch(view, route=torch.ones(6, dtype=torch.long)), NEEDS).rows
    assert alone.vocab_size == min(size, 390), "whoever has rows in a batch"
    bare = prepared(RoutedTeacher({"a": Plain(), "b": Plain()}))
    assert bare.signal(Batch(view, route=ROUTE), NEEDS).rows.vocab_size == 390


@pytest.mark.parametrize("kind", [MixtureTeacher, RoutedTeacher])
def test_members_that_cannot_be_are_refused(kind):
    """Prevents a model that is taken for a teacher, and names that would be read as paths in a checkpoint."""
    with pytest.raises(ValueError, match="got no teachers"):
        kind({})
    with pytest.raises(TypeError, match="got teachers as a list; expected a mapping of names to teachers"):
        kind([Heard()])
    with pytest.raises(TypeError, match="'a' is a LlamaForCausalLM; expected a Teacher.*LocalTeacher"):
        kind({"a": make_model()})
    with pytest.raises(ValueError, match="'a' is a MixtureTeacher; expected a single one"):
        kind({"a": MixtureTeacher({"b": Heard()})})
    for name in ("a.b", "", 3):
        with pytest.raises(ValueError, match="without a dot"):
            kind({name: Heard()})
    foreign, mute = Heard(), Heard()
    foreign.other_vocabulary, mute.provides = True, frozenset({STATES})
    with pytest.raises(ValueError, match="'a' .Heard. has another vocabulary"):
        kind({"a": foreign})
    with pytest.raises(ValueError, match="'a' .Heard. provides .*distribution"):
        kind({"a": mute})


def test_a_second_view_is_needed_where_nobody_can_do_without():
    """Prevents refusing a self-teacher that stands beside another model."""
    assert MixtureTeacher({"a": SelfTeacher("live"), "b": SelfTeacher("live")}).needs_second_view
    assert not MixtureTeacher({"a": SelfTeacher("live"), "b": LocalTeacher("org/name")}).needs_second_view
    assert MixtureTeacher({"a": SelfTeacher("adapter_off"), "b": LocalTeacher("org/name")}).needs_adapter
    assert not MixtureTeacher({"b": LocalTeacher("org/name")}).needs_adapter


def test_every_members_tokens_are_compared():
    """Prevents a second teacher of another family, whose ids mean other tokens."""
    teachers = {"a": Heard(), "b": Heard()}
    teachers["a"].tokenizer, teachers["b"].tokenizer = Words("x", "y"), Words("x", "z")
    with pytest.raises(VocabularyError, match="id 1 is 'y' for the student and 'z' for the teacher"):
        MixtureTeacher(teachers).check_vocabulary(Words("x", "y"))
    RoutedTeacher({"a": teachers["a"]}).check_vocabulary(Words("x", "y", "more"))


def test_every_members_head_is_looked_at():
    """Prevents a second teacher whose logits aren't what its head multiplies to."""
    teachers, seen = two(), []
    prepared(MixtureTeacher({**teachers, "again": teachers["a"]})).check_heads(seen.append)
    assert seen == [teacher.model for teacher in teachers.values()]


def test_every_member_stands_in_the_record():
    """Prevents a card that doesn't say who taught, and by how much."""
    teachers = two()
    told = MixtureTeacher(teachers, SHARES).describe()
    assert told["kind"] == "mixture" and list(told["members"]) == ["a", "b"]
    assert told["members"]["b"] == {**teachers["b"].describe(), "share": 0.75}
    told = RoutedTeacher(teachers, "expert").describe()
    assert told == {
        "kind": "routed",
        "column": "expert",
        "members": {name: teacher.describe() for name, teacher in teachers.items()},
    }


# ---------------------------------------------------------------------------------------- training


def routed_run(folder: Any, **overrides: Any) -> tuple[dict[str, Tensor], list[float]]:
    """Two steps on sixteen rows that name one of two teachers."""
    return run(folder, teacher=RoutedTeacher(two()), rows=dataset_of(NAMED), **overrides)


def routed_with_a_moving_member(folder: Any, **overrides: Any) -> Any:
    """A trainer whose rows are taught by another model and by an average of the student's past adapters."""
    teacher = RoutedTeacher({"a": LocalTeacher(make_model(seed=1)), "b": EmaTeacher(decay=0.5)})
    return make_trainer(folder, teacher=teacher, rows=NAMED, peft_config=lora(), learning_rate=0.2, **overrides)


def test_accumulation_does_not_change_a_routed_run(tmp_path):
    """Prevents an update that depends on which teachers meet in a micro-batch."""
    whole, losses = routed_run(tmp_path / "whole")
    for size in (4, 1):
        split, found = routed_run(
            tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=8 // size
        )
        assert worst_difference(whole, split) < 1e-4
        assert found == pytest.approx(losses, rel=1e-4)


def test_rows_that_name_teachers_are_enough(tmp_path):
    """Prevents a trainer that takes rows and forgets to ask them who teaches, in training or in evaluation."""
    settings = {"demonstrations": [], "prompts": PromptStyle()}
    by_dataset, losses = routed_run(tmp_path / "dataset", **settings)
    by_rows, found = run(tmp_path / "rows", teacher=RoutedTeacher(two()), rows=NAMED, **settings)
    assert worst_difference(by_dataset, by_rows) < 1e-6 and found == pytest.approx(losses)
    trainer = make_trainer(tmp_path / "eval", teacher=RoutedTeacher(two()), rows=NAMED, eval_dataset=NAMED, **settings)
    assert trainer.evaluate()["eval_loss"] > 0
    for rows, held in ((ROWS[:16], NAMED), (NAMED, [{**NAMED[0], "teacher": "c"}])):
        with pytest.raises(ValueError, match=".* row 0: .*known teachers are a, b"):
            make_trainer(tmp_path, teacher=RoutedTeacher(two()), rows=rows, eval_dataset=held, **settings)


def test_states_of_several_are_refused_before_training(tmp_path):
    """Prevents a term on hidden states from falling over at the first step."""
    terms = [{"kind": "forward_kl"}, {"kind": "hidden_mse"}]
    with pytest.raises(ValueError, match="MixtureTeacher provides .*distribution"):
        make_trainer(tmp_path, teacher=MixtureTeacher(two()), objective=terms)


def test_a_routed_run_is_not_that_of_one_teacher(tmp_path):
    """A guard: the two teachers of the run above teach different things."""
    routed, _ = routed_run(tmp_path / "routed")
    for name, teacher in two().items():
        alone, _ = run(tmp_path / name, teacher=teacher, rows=dataset_of(NAMED, None))
        assert worst_difference(routed, alone) > 0.1


def test_a_mixture_of_one_trains_like_that_one(tmp_path):
    """Prevents anything of the run from depending on whether a teacher stands alone or in a mixture."""
    rows = Dataset.from_list(ROWS[:16]).to_list()
    alone, _ = run(tmp_path / "alone", teacher=LocalTeacher(make_model(seed=1)), rows=rows, demonstrations=[])
    mixture = MixtureTeacher({"a": LocalTeacher(make_model(seed=1)), "b": LocalTeacher(make_model(seed=1))})
    beside, _ = run(tmp_path / "beside", teacher=mixture, rows=rows, demonstrations=[])
    assert worst_difference(alone, beside) < 1e-4


def test_a_run_with_a_moving_member_resumes(tmp_path):
    """Prevents a checkpoint that forgets a member's state, so that a resumed run has another teacher."""

    def made(folder: str, **overrides: Any) -> Any:
        teacher = MixtureTeacher({"large": LocalTeacher(make_model(seed=1)), "own": EmaTeacher(decay=0.5)})
        return make_trainer(
            tmp_path / folder, teacher=teacher, learning_rate=0.1, save_strategy="steps", save_steps=2, **overrides
        )

    straight = made("run", max_steps=4)
    straight.train()
    again = made("again", max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    first, second = straight.teacher.state_dict(), again.teacher.state_dict()
    assert first.keys() == second.keys() and all(key.startswith("own.") for key in first) and len(first) > 5
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=0)
    moved = EmaTeacher()
    moved.prepare(Accelerator(cpu=True), make_model(seed=0))
    before = {f"own.{key}": value for key, value in moved.state_dict().items()}
    assert any(not torch.equal(before[key].float(), value.float()) for key, value in first.items())
    for (name, ours), theirs in zip(straight.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


# ---------------------------------------------------------------------------------- pages, recipes

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["mixture", "routed"])
def test_recipes_of_several_teachers_build(name):
    """Prevents a recipe that the schema refuses, or whose data name a teacher that it doesn't have."""
    recipe = load_recipe(ROOT / "recipes" / "several" / f"{name}.yaml")
    built = build(recipe, dry=True)
    rows = load_rows(built.sources["train"])
    teacher = make_teacher(recipe)
    assert teacher.describe()["kind"] == name and len(teacher.teachers) == 2
    if name == "mixture":
        assert teacher.shares == {"large": 0.75, "middle": 0.25}
    else:
        assert isinstance(teacher.teachers["own"], SelfTeacher)
        examples = dataset_of(list(rows), teacher.route)
        assert {example["route"] for example in examples} == {0, 1}
    assert len(rows) >= 40


def test_the_blocks_of_the_page_run():
    """Prevents a page whose code was right once."""
    text = (ROOT / "docs" / "several_teachers.md").read_text("utf-8")
    code = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(code) == 2
    exec("\n".join(code), {})  # noqa: S102
