"""The causal shift and where rows come from, held against what the models themselves say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfkd.batch import IGNORE, Batch, View
from hfkd.objective import build_objective
from hfkd.rows import DenseRows, Head, RowLayout, decode, supervised


def padded(sequences: list[tuple[list[int], list[int]]], side: str, pad: int = 2) -> View:
    """Prompts and answers as one batch, padded on a side."""
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    rows = []
    for prompt, answer in sequences:
        fill = width - len(prompt) - len(answer)
        row = [prompt + answer, [1] * (width - fill), [IGNORE] * len(prompt) + answer]
        blank = [[pad] * fill, [0] * fill, [IGNORE] * fill]
        rows.append([a + b if side == "right" else b + a for a, b in zip(row, blank, strict=True)])
    return View(*(torch.tensor(column) for column in zip(*rows, strict=True)))


ANSWERS = [([9, 10, 11], [30, 40, 50]), ([12], [60]), ([13, 14, 15, 16, 17], [70, 80])]


def rows_of(model, view: View) -> DenseRows:
    """The supervised rows of a model."""
    hidden = decode(model, view.input_ids, view.attention_mask, view.position_ids).last_hidden_state
    return DenseRows(supervised(hidden, view.labels), Head.of(model))


class Counting:
    """Stands for a model that is certain that the next token is the last one plus 1."""

    vocabulary = 24

    def rows(self, view: View) -> DenseRows:
        """Hidden states are one-hot codes of the ids; the head moves each code to the next id."""
        hidden = torch.nn.functional.one_hot(view.input_ids, self.vocabulary).float()
        head = 50.0 * torch.eye(self.vocabulary).roll(1, dims=0)
        return DenseRows(supervised(hidden, view.labels), Head(head))


def cost(rows: DenseRows, targets: Tensor) -> float:
    """Cross-entropy per token (nats)."""
    return build_objective("cross_entropy")(rows, None, targets).total.item() / len(targets)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_that_knows_the_next_token_pays_nothing(side):
    """Prevents the classic off-by-one: a model that is right about every answer token must cost 0, on either side of
    padding.
    """
    right = padded([([4, 5], [6, 7, 8]), ([9], [10]), ([11, 12, 13], [14, 15])], side, pad=0)
    assert cost(Counting().rows(right), right.targets) == pytest.approx(0.0, abs=1e-6)
    # A guard: the same rows cost a lot against ids that are one place off.
    assert cost(Counting().rows(right), right.targets - 1) > 10
    assert cost(Counting().rows(right), right.targets + 1) > 10


def test_the_first_answer_token_is_learned_and_the_last_row_is_not():
    """Prevents a shift in the other direction, which a constant continuation would hide."""
    first_wrong = padded([([4, 5], [20, 21, 22])], "right", pad=0)
    assert cost(Counting().rows(first_wrong), first_wrong.targets) == pytest.approx(50.0 / 3, rel=1e-3)
    states = torch.arange(5.0)[None, :, None]
    assert supervised(states, first_wrong.labels)[:, 0].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_equals_the_one_of_transformers(model, side):
    """Prevents a shift, a mask or positions of our own invention: transformers shifts labels by itself."""
    view = padded(ANSWERS, side)
    expected = model(
        input_ids=view.input_ids,
        attention_mask=view.attention_mask,
        position_ids=view.position_ids,
        labels=view.labels,
    ).loss.item()
    assert expected > 0.5
    assert cost(rows_of(model, view), view.targets) == pytest.approx(expected, rel=1e-5)


def test_padding_side_does_not_change_the_rows(model):
    """Prevents left padding from moving positions: both views of a pair may be padded differently."""
    left, right = (rows_of(model, padded(ANSWERS, side)).hidden for side in ("left", "right"))
    assert left.shape == (6, 32) and left.abs().max() > 0.1
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_two_views_pair_the_same_tokens(model):
    """Prevents row i of the teacher from speaking of another token than row i of the student: with one prompt and
    other padding they must be the very same rows.
    """
    longer = padded([([9, 10, 11], [30, 40, 50]), ([12], [60]), ([13, 14, 15, 16, 17, 18, 19], [70, 80])], "left")
    batch = Batch(padded(ANSWERS, "right"), longer)
    assert torch.equal(batch.student.targets, batch.teacher.targets)
    student, teacher = (rows_of(model, view).hidden for view in (batch.student, batch.teacher))
    torch.testing.assert_close(student[:4], teacher[:4], rtol=1e-4, atol=1e-5)
    assert (student[4:] - teacher[4:]).abs().max() > 1e-2  # its prompt is another


def test_supervised_keeps_the_graph_and_only_the_chosen_positions():
    """Prevents gradients into positions that nothing was learned at, and a selection that cuts the graph."""
    states = torch.randn(3, 7, 4, requires_grad=True)
    view = padded(ANSWERS, "right")
    supervised(states, view.labels).sum().backward()
    touched = states.grad.abs().sum(-1) > 0
    expected = torch.zeros(3, 7, dtype=torch.bool)
    expected[0, 2:5] = expected[1, 0] = expected[2, 4:6] = True
    assert torch.equal(touched, expected)


def test_layout_says_sequence_and_place():
    """Prevents the losses that compare rows from comparing those of other sequences or other places."""
    for side in ("left", "right"):
        layout = RowLayout.of(padded(ANSWERS, side).labels)
        assert layout.sequence.tolist() == [0, 0, 0, 1, 2, 2]
        assert layout.position.tolist() == [0, 1, 2, 0, 0, 1]
        assert len(layout) == 6


def test_layout_skips_gaps_and_empty_sequences():
    """Prevents places that count the user's turns of a conversation, or a sequence that shifts the numbers of the
    next.
    """
    labels = torch.full((3, 7), IGNORE)
    labels[0, 2], labels[0, 5] = 8, 9
    labels[2, 0], labels[2, 6] = 7, 7  # the first position is predicted by nothing
    layout = RowLayout.of(labels)
    assert layout.sequence.tolist() == [0, 0, 2]
    assert layout.position.tolist() == [0, 1, 0]
    assert len(RowLayout.of(torch.full((2, 4), IGNORE))) == 0


def test_layout_of_one_sequence():
    """Prevents a default layout that puts every row into a group of its own."""
    layout = RowLayout.single(3, torch.device("cpu"))
    assert layout.sequence.tolist() == [0, 0, 0] and layout.position.tolist() == [0, 1, 2]


def test_decode_stops_below_the_head(model, monkeypatch):
    """Prevents a forward that makes the [B, T, V] logits which the objective is there to avoid."""
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("the head was run"))
    output = decode(model, torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.long))
    assert output.last_hidden_state.shape == (1, 3, 32)
    assert output.past_key_values is None
    assert getattr(output, "hidden_states", None) is None
