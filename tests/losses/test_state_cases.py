"""Cases that one loss on hidden states must get right: what it doesn't see, where it is 0, what bounds it."""

from __future__ import annotations

import math

import pytest
import torch
from state_battery import LAYERS, ROWS, TEACHER_LAYERS, WIDTH, layout_of, ready, replaced, states_case, unit

from hfkd.losses import STATE_LOSSES
from hfkd.losses.state import StateRows
from hfkd.rows import RowLayout

# ------------------------------------------------------------------------------------------------------- relation


@pytest.mark.parametrize("arguments", [{}, {"measure": "kl", "temperature": 0.3}])
def test_relation_sees_no_rotation_and_no_size_of_either_side(arguments):
    """Prevents a loss that asks for the teacher's coordinates, which a model of another width can't have."""
    generator = torch.Generator().manual_seed(4)
    states = states_case()
    loss = ready("relation", **arguments)
    base = loss(states)
    assert base.max() > 1e-3
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    turned = {layer: 3.0 * state @ turn for layer, state in states.student.items()}
    torch.testing.assert_close(loss(replaced(states, turned)), base, rtol=1e-4, atol=1e-6)
    theirs = {layer: 0.2 * state @ turn for layer, state in states.teacher.items()}
    torch.testing.assert_close(loss(replaced(states, states.student, theirs)), base, rtol=1e-4, atol=1e-6)


def test_relation_compares_rows_of_one_answer_only():
    """Prevents similarities across two answers of a batch, which depend on what was batched together."""
    states = states_case()
    loss = ready("relation")
    base = loss(states)
    assert base[5].item() == pytest.approx(0.0, abs=1e-6)  # an answer of one token: its similarity to itself is 1
    moved = {layer: torch.cat([state[:6], torch.randn(6, WIDTH)]) for layer, state in states.student.items()}
    assert torch.equal(loss(replaced(states, moved))[:6], base[:6])
    assert not torch.allclose(loss(replaced(states, moved))[6:], base[6:])


def test_relation_reads_long_answers_in_windows():
    """Prevents a matrix of all tokens with all tokens of a long answer, or windows across answers."""
    states = states_case()
    windowed = ready("relation", window=3)(states)
    runs = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 4, 4])
    by_hand = ready("relation")(
        StateRows(states.student, states.teacher, layout_of(runs), states.targets, states.teacher_head)
    )
    torch.testing.assert_close(windowed, by_hand, rtol=1e-6, atol=1e-7)


# ----------------------------------------------------------------------------------------------- norm and direction


def test_norm_direction_is_zero_along_the_head_and_as_long_as_the_teacher():
    """Prevents a direction taken from another row of the head, or a norm that is punished for being large."""
    states = states_case()
    rows = states.teacher_head.weight[states.targets]
    least = states.teacher[TEACHER_LAYERS].norm(dim=-1, keepdim=True) / rows.norm(dim=-1, keepdim=True)
    loss = ready("norm_direction", layers="last")
    for factor in (1.0, 1.5, 20.0):
        value = loss(replaced(states, states.student | {LAYERS: factor * least * rows}))
        assert value.abs().max() <= 1e-6
    half = loss(replaced(states, states.student | {LAYERS: 0.5 * least * rows}))
    assert half.tolist() == pytest.approx([0.5] * ROWS, abs=1e-5)
    away = loss(replaced(states, states.student | {LAYERS: -1.0 * least * rows}))
    assert away.tolist() == pytest.approx([2.0] * ROWS, abs=1e-5)


def test_norm_direction_needs_the_teachers_head():
    """Prevents an attribute error in the first step with a teacher that was stored."""
    states = states_case()
    bare = StateRows(states.student, states.teacher, states.layout, states.targets, None)
    with pytest.raises(ValueError, match="norm_direction"):
        ready("norm_direction")(bare)


# ---------------------------------------------------------------------------------------------- mutual information


def gaussians(correlation: float, rows: int = 4096, width: int = 10, seed: int = 0) -> StateRows:
    """x and y of `width` independent pairs with this correlation: their information is -width/2 ln(1 - rho^2)."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(rows, width, generator=generator) for _ in range(2))
    y = correlation * x + math.sqrt(1 - correlation**2) * noise
    zeros = torch.zeros(rows, dtype=torch.long)
    return StateRows({1: x}, {1: y}, RowLayout(zeros, torch.arange(rows)), zeros, None)


def information(states: StateRows, alpha: float, group_size: int, steps: int = 0) -> float:
    """The bound (nats) after `steps` steps on the loss's own parameters, its critic being fixed."""
    loss = STATE_LOSSES["mutual_information"](layers=[[1, 1]], interpolation=alpha, group_size=group_size)
    loss.prepare(1, 1, 10, 10)
    parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.3) if steps else None
    for _ in range(steps):
        optimizer.zero_grad()
        loss(states).mean().backward()
        optimizer.step()
    return -loss(states).mean().item()


def info_nce(states: StateRows, group_size: int, temperature: float = 0.1) -> float:
    """E[f_ii - log mean_j exp f(x_j, y_i)] over groups, f the cosine over the temperature."""
    shares = []
    for start in range(0, len(states.targets), group_size):
        x, y = (unit(side[1][start : start + group_size]) for side in (states.student, states.teacher))
        critic = x @ y.T / temperature  # [x, y]
        shares.append(critic.diagonal() - critic.logsumexp(0) + math.log(len(x)))
    return torch.cat(shares).mean().item()


def test_information_of_independent_states_is_small():
    """Prevents a bound from below that lies above the truth."""
    for alpha in (0.5, 0.9, 1.0):
        assert information(gaussians(0.0), alpha, 64) <= 0.1


@pytest.mark.parametrize("group_size", [4, 16, 64])
def test_information_at_alpha_one_is_infonce_and_never_above_the_log_of_the_group(group_size):
    """Prevents a bound whose ceiling isn't the one that the docstring gives: 8.30 nats are there to be found."""
    states = gaussians(0.9)
    found = information(states, 1.0, group_size)
    assert found <= math.log(group_size) + 1e-6
    assert found == pytest.approx(info_nce(states, group_size), rel=1e-4)
    if group_size <= 16:
        assert found >= math.log(group_size) - 0.3, "it saturates at ln K"


def test_information_at_smaller_alpha_passes_the_ceiling():
    """Prevents an interpolation that keeps the ceiling of InfoNCE, or a baseline that never learns."""
    states, group_size = gaussians(0.9, rows=512), 16
    learned = information(states, 0.05, group_size, steps=40)
    assert math.log(group_size) < learned < 8.30
    assert learned > information(states, 0.05, group_size)


def test_information_needs_two_rows_and_never_sees_a_row_of_another_group():
    """Prevents a log of nothing at the end of a batch, and a memory that grows with the square of the batch."""
    one = gaussians(0.9, rows=1)
    loss = STATE_LOSSES["mutual_information"](layers=[[1, 1]], group_size=4)
    loss.prepare(1, 1, 10, 10)
    assert loss(one).tolist() == [0.0]
    states = gaussians(0.9, rows=8)
    moved = StateRows(
        {1: torch.cat([states.student[1][:4], torch.randn(4, 10)])},
        states.teacher,
        states.layout,
        states.targets,
        None,
    )
    torch.testing.assert_close(loss(moved)[:4], loss(states)[:4])
    assert not torch.allclose(loss(moved)[4:], loss(states)[4:])


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("mutual_information", {"interpolation": 1.5}),
        ("mutual_information", {"interpolation": -0.1}),
        ("mutual_information", {"temperature": 0.0}),
        ("mutual_information", {"group_size": 1}),
        ("relation", {"measure": "l1"}),
        ("relation", {"temperature": 0.0}),
        ("relation", {"window": 0}),
    ],
)
def test_arguments_without_a_meaning_are_refused(kind, arguments):
    """Prevents a loss that is NaN, or silently another one, because of one number in a recipe."""
    with pytest.raises(ValueError, match=next(iter(arguments))) as caught:
        STATE_LOSSES[kind](**arguments)
    assert kind in str(caught.value)
