"""Losses on hidden states: their definitions, which layers they pair, and what each must not see.

References are written here, in float64 and from the formulas. The order of work is a run's: made from settings,
prepared for two models, given the states of the layers that it asked for.
"""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from state_battery import (
    AGREEING,
    LAYERS,
    ROWS,
    SEQUENCE,
    TEACHER_LAYERS,
    WIDTH,
    every_state_loss,
    ready,
    replaced,
    states_case,
    unit,
)
from torch import Tensor, nn

from hfkd.losses import STATE_LOSSES
from hfkd.losses.state import StateLoss, StateRows
from hfkd.rows import Head, RowLayout
from hfkd.signal import STATES

# -------------------------------------------------------------------------------------------------- definitions


def projected(loss: StateLoss, place: int, state: Tensor) -> Tensor:
    if len(loss.projectors) == 0:
        return state.double()
    return state.double() @ loss.projectors[place].weight.detach().double().T


def standard(values: Tensor) -> Tensor:
    centred = values - values.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt()


def hidden_mse(student, teacher, states, normalize=False):
    if normalize:
        student, teacher = standard(student.double()), standard(teacher.double())
    return ((student.double() - teacher.double()) ** 2).mean(-1)


def hidden_cosine(student, teacher, states):
    return 1 - (unit(student) * unit(teacher)).sum(-1)


def relation(student, teacher, states, measure="mse", temperature=1.0):
    value = torch.zeros(len(student), dtype=torch.float64)
    for number in states.layout.sequence.unique():
        rows = (states.layout.sequence == number).nonzero()[:, 0]
        s, t = (unit(x[rows]) @ unit(x[rows]).T for x in (student, teacher))
        if measure == "mse":
            cost = ((s - t) ** 2).mean(-1)
        else:
            p, q = torch.softmax(t / temperature, -1), torch.softmax(s / temperature, -1)
            cost = (p * (p.log() - q.log())).sum(-1)
        value = value.index_add(0, rows, cost)
    return value


def norm_direction(student, teacher, states):
    centre = unit(states.teacher_head.weight[states.targets])
    longer = torch.maximum(student.double().norm(dim=-1), teacher.double().norm(dim=-1))
    return 1 - (student.double() * centre).sum(-1) / longer


DEFINITIONS = [
    ("hidden_mse", {}, hidden_mse),
    ("hidden_mse", {"normalize": True}, hidden_mse),
    ("hidden_cosine", {}, hidden_cosine),
    ("relation", {}, relation),
    ("relation", {"measure": "kl", "temperature": 0.5}, relation),
    ("norm_direction", {}, norm_direction),
]
PAIRS = {"uniform": [(1, 2), (2, 4), (3, 6)], "last": [(3, 6)], "named": [(0, 1), (3, 3)]}


@pytest.mark.parametrize("layers", list(PAIRS))
@pytest.mark.parametrize("teacher_width", [WIDTH, WIDTH + 3])
@pytest.mark.parametrize(("kind", "arguments", "define"), DEFINITIONS, ids=[f"{d[0]}-{d[1]}" for d in DEFINITIONS])
def test_value_and_gradient_equal_the_definition(kind, arguments, define, teacher_width, layers):
    """Prevents a state loss that shrinks steadily and isn't what it is called, or pairs other layers than it says."""
    states = states_case(teacher_width)
    loss = ready(kind, teacher_width, layers=layers if layers != "named" else [[0, 1], [3, 3]], **arguments)
    assert [tuple(pair) for pair in loss.pairs] == PAIRS[layers]
    exact = {layer: state.detach().double().requires_grad_(True) for layer, state in states.student.items()}
    shares = [
        define(projected_graph(loss, place, exact[ours], kind), states.teacher[theirs], states, **arguments)
        for place, (ours, theirs) in enumerate(PAIRS[layers])
    ]
    expected = torch.stack(shares).mean(0)
    value = loss(states)
    assert value.dtype == torch.float32 and value.shape == (ROWS,)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, _ in PAIRS[layers]:
        (theirs_,) = torch.autograd.grad(expected.sum(), exact[ours], retain_graph=True)
        (gradient,) = torch.autograd.grad(value.sum(), states.student[ours], retain_graph=True)
        assert theirs_.abs().max() > 1e-4
        torch.testing.assert_close(gradient.double(), theirs_, rtol=1e-4, atol=1e-6)


def projected_graph(loss: StateLoss, place: int, state: Tensor, kind: str) -> Tensor:
    return state if kind == "relation" else projected(loss, place, state)


@pytest.mark.parametrize("kind", AGREEING)
def test_equal_states_cost_nothing(kind):
    """Prevents a pull on a student that is already where it should be."""
    states = states_case()
    same = {layer: states.student[layer // 2].detach().clone() for layer in range(TEACHER_LAYERS + 1)}
    value = ready(kind)(replaced(states, states.student, same))
    gradients = torch.autograd.grad(value.sum(), [states.student[layer] for layer in range(1, LAYERS + 1)])
    assert value.abs().max() <= 1e-6 and all(gradient.abs().max() <= 1e-5 for gradient in gradients)


@every_state_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_measured_in_float32(kind, dtype):
    """Prevents squares of large states that overflow, and cosines of three digits."""
    half = states_case(dtype=dtype)
    whole = StateRows(
        {layer: state.detach().float() for layer, state in half.student.items()},
        {layer: state.float() for layer, state in half.teacher.items()},
        half.layout,
        half.targets,
        Head(half.teacher_head.weight.float()),
    )
    loss = ready(kind)
    expected = loss(whole)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = loss(half)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.autograd.grad(value.sum(), half.student[LAYERS])[0]
    assert gradient.dtype == dtype and torch.isfinite(gradient).all() and gradient.abs().max() > 0


@every_state_loss
def test_finite_at_zero_and_huge_states(kind):
    """Prevents NaN from a vector without a direction: a masked position, or a layer that starts at zeros."""
    states = states_case()
    for scale in (0.0, 1e4):
        student = {layer: (scale * state).detach().requires_grad_(True) for layer, state in states.student.items()}
        for teacher in (states.teacher, {layer: scale * state for layer, state in states.teacher.items()}):
            value = ready(kind, layers="last")(replaced(states, student, teacher))
            (gradient,) = torch.autograd.grad(value.sum(), student[LAYERS])
            assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


@every_state_loss
def test_teachers_states_get_no_gradient_and_rows_none_give_none(kind):
    """Prevents a teacher that drifts, and a rank without supervised tokens that fails."""
    states = states_case()
    for state in states.teacher.values():
        state.requires_grad_(True)
    ready(kind)(states).sum().backward()
    assert states.student[LAYERS].grad.abs().max() > 0
    assert all(state.grad is None for state in states.teacher.values())
    none = StateRows(
        {layer: state[:0] for layer, state in states.student.items()},
        {layer: state[:0].detach() for layer, state in states.teacher.items()},
        RowLayout(SEQUENCE[:0], SEQUENCE[:0]),
        states.targets[:0],
        states.teacher_head,
    )
    assert ready(kind)(none).shape == (0,)


# --------------------------------------------------------------------------------------------------- which layers


@pytest.mark.parametrize(
    ("student_layers", "teacher_layers", "expected"),
    [
        (4, 8, [(1, 2), (2, 4), (3, 6), (4, 8)]),
        (3, 4, [(1, 1), (2, 3), (3, 4)]),
        (5, 5, [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]),
        (6, 3, [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3)]),
    ],
)
def test_uniform_pairs_spread_over_both_models(student_layers, teacher_layers, expected):
    """Prevents a student that copies its teacher's first layers only, as its depth grows."""
    loss = STATE_LOSSES["hidden_mse"]()
    loss.prepare(student_layers, teacher_layers, WIDTH, WIDTH)
    assert [tuple(pair) for pair in loss.pairs] == expected
    last = STATE_LOSSES["hidden_mse"](layers="last")
    last.prepare(student_layers, teacher_layers, WIDTH, WIDTH)
    assert [tuple(pair) for pair in last.pairs] == [(student_layers, teacher_layers)]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([[LAYERS + 1, 0]], str(LAYERS + 1)),
        ([[0, TEACHER_LAYERS + 1]], str(TEACHER_LAYERS + 1)),
        ([[-1, 2]], "-1"),
        ([[1, 2], [1, 2]], "1"),
        ([], "layers"),
        ([[1, 2, 3]], "layers"),
        ("first", "first"),
    ],
    ids=["student's", "teacher's", "below 0", "twice", "none", "three", "name"],
)
@every_state_loss
def test_layers_that_are_not_there_are_refused(kind, layers, words):
    """Prevents a layer counted from the end, or past it, from being another layer or a late KeyError."""
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        ready(kind, layers=layers)
    assert kind in str(caught.value)


# ----------------------------------------------------------------------------------------------------- projectors


@every_state_loss
def test_projectors_are_made_where_widths_differ(kind):
    """Prevents a shape error in the first step of a run between models of two sizes, or projectors for nothing."""
    compares = STATE_LOSSES[kind].compares_vectors
    assert compares == (kind != "relation")
    assert len(ready(kind, layers="uniform").projectors) == 0
    loss = ready(kind, WIDTH + 3, layers="uniform")
    assert len(loss.projectors) == (LAYERS if compares else 0)
    for projector in loss.projectors:
        assert isinstance(projector, nn.Linear) and projector.bias is None
        assert projector.weight.shape == (WIDTH + 3, WIDTH) and projector.weight.dtype == torch.float32
        assert projector.weight.requires_grad
    loss(states_case(WIDTH + 3)).sum().backward()
    assert all(projector.weight.grad.abs().max() > 0 for projector in loss.projectors)


@pytest.mark.parametrize("kind", [kind for kind in STATE_LOSSES if kind != "relation"])
def test_projectors_can_be_asked_for_and_refused(kind):
    """Prevents a setting that is read in one of the two cases only."""
    assert len(ready(kind, layers="uniform", project=True).projectors) == LAYERS
    assert len(ready(kind, layers="uniform", project=False).projectors) == 0
    with pytest.raises(ValueError, match=kind):
        ready(kind, WIDTH + 3, project=False)


def test_preparing_twice_keeps_what_was_learned():
    """Prevents a resumed or re-prepared run whose projectors start anew."""
    loss = ready("hidden_mse", WIDTH + 3)
    before = [projector.weight for projector in loss.projectors]
    loss.prepare(LAYERS, TEACHER_LAYERS, WIDTH, WIDTH + 3)
    assert all(one.weight is other for one, other in zip(loss.projectors, before, strict=True))


@every_state_loss
def test_settings_rebuild_the_loss(kind):
    """Prevents a run record that names another loss than the one that was trained."""
    loss = STATE_LOSSES[kind](layers=[[1, 2], [3, 6]])
    described = loss.describe()
    assert described.pop("kind") == kind == STATE_LOSSES[kind].key
    again = STATE_LOSSES[kind](**described)
    assert again.describe() == loss.describe()
    for one in (loss, again):
        one.prepare(LAYERS, TEACHER_LAYERS, WIDTH, WIDTH)
    assert torch.equal(again(states_case()), loss(states_case()))


@every_state_loss
def test_says_what_it_needs_and_that_it_needs_company(kind):
    """Prevents a head that learns nothing while the curve of its only term falls."""
    assert STATE_LOSSES[kind].needs == {STATES}
    assert not STATE_LOSSES[kind]().may_stand_alone
    text = inspect.getdoc(STATE_LOSSES[kind])
    for section in ("Formula:", "Args:", "Reads:", "Cost:", "Undefined:", "Paper:", "Example:"):
        assert section in text, f"{kind} has no {section}"
    assert STATE_LOSSES[kind].__name__.lower() == kind.replace("_", "")


class Manhattan(StateLoss):
    """A user's own state loss: one method."""

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [N]."""
        return (student - teacher).abs().sum(-1)


def test_a_state_loss_of_ones_own_is_one_method():
    """Prevents a plug-in point that works for our classes only."""
    loss = Manhattan(layers="last")
    loss.prepare(LAYERS, TEACHER_LAYERS, WIDTH, WIDTH)
    states = states_case()
    expected = (states.student[LAYERS].double() - states.teacher[TEACHER_LAYERS].double()).abs().sum(-1)
    torch.testing.assert_close(loss(states).double(), expected)
    assert Manhattan.key == "manhattan" and loss.describe()["kind"] == f"{__name__}:Manhattan"
