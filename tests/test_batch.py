"""The two views: the shift, the positions, and the way through a flat dictionary and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfkd.batch import IGNORE, Batch, View, predicted


def view_of(labels: list[list[int]], ids: list[list[int]] | None = None, mask: list[list[int]] | None = None) -> View:
    """A view from lists; ids count up and nothing is padded unless they are given."""
    learned = torch.tensor(labels)
    tokens = torch.arange(learned.numel()).reshape(learned.shape) + 3 if ids is None else torch.tensor(ids)
    return View(tokens, torch.ones_like(learned) if mask is None else torch.tensor(mask), learned)


def two_views() -> Batch:
    """Two answers, [5, 6] and [7], behind prompts of other lengths, with a weight for each of the three tokens."""
    student = view_of([[IGNORE, IGNORE, 5, 6], [IGNORE, 7, IGNORE, IGNORE]], mask=[[1, 1, 1, 1], [1, 1, 0, 0]])
    teacher = view_of(
        [[IGNORE, IGNORE, IGNORE, 5, 6], [IGNORE, IGNORE, IGNORE, IGNORE, 7]], mask=[[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    )
    return Batch(student, teacher, torch.tensor([0.5, 2.0, 4.0]))


def test_the_position_before_a_label_predicts_it():
    """Prevents the off-by-one that drops the first answer token and learns one past the end."""
    labels = torch.tensor([[IGNORE, IGNORE, 5, 6, IGNORE]])
    assert predicted(labels).tolist() == [[False, True, True, False]]


def test_a_label_that_nothing_predicts_is_not_counted():
    """Prevents a count with one row more than there are logits, when a sequence is learned from its first token on."""
    view = view_of([[4, 5, 6]])
    assert view.tokens == 2
    assert view.targets.tolist() == [5, 6]


def test_targets_go_row_by_row_over_padding():
    """Prevents targets in another order than the rows of the two models."""
    batch = two_views()
    assert batch.student.targets.tolist() == batch.teacher.targets.tolist() == [5, 6, 7]
    assert batch.student.tokens == batch.teacher.tokens == 3


def test_positions_count_real_tokens_only():
    """Prevents the two views from reading the same answer at other positions because one of them is padded."""
    left = view_of([[IGNORE] * 5], mask=[[0, 0, 1, 1, 1]])
    right = view_of([[IGNORE] * 5], mask=[[1, 1, 1, 0, 0]])
    assert left.position_ids[0, 2:].tolist() == right.position_ids[0, :3].tolist() == [0, 1, 2]
    assert int(left.position_ids.min()) == 0 and int(right.position_ids.max()) < 5


def test_positions_are_whole_numbers_whatever_the_mask_is():
    """Prevents a boolean mask, as some collators return it, from giving booleans for positions."""
    view = View(torch.tensor([[3, 4, 5]]), torch.tensor([[False, True, True]]), torch.tensor([[IGNORE, IGNORE, 5]]))
    assert view.position_ids.dtype == torch.long
    assert view.position_ids.tolist() == [[0, 0, 1]]


def test_without_a_second_prompt_the_teacher_reads_the_students_view():
    """Prevents a teacher without a prompt of its own from reading nothing."""
    batch = Batch(two_views().student)
    assert batch.teacher_view is batch.student
    assert two_views().teacher_view is not two_views().student


def assert_same(first: Batch, second: Batch) -> None:
    """Both views and the weights, entry by entry."""
    for ours, theirs in ((first.student, second.student), (first.teacher, second.teacher)):
        assert (ours is None) == (theirs is None)
        for name in () if ours is None else ("input_ids", "attention_mask", "labels"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert (first.token_weights is None) == (second.token_weights is None)
    if first.token_weights is not None:
        assert torch.equal(first.token_weights, second.token_weights)


def test_the_flat_form_holds_everything():
    """Prevents a view or the weights from getting lost between the collator and the loss."""
    assert_same(Batch.from_inputs(two_views().to_inputs()), two_views())


def test_what_is_absent_stays_absent():
    """Prevents keys of None in the inputs, which Accelerate can't move, and made-up weights."""
    plain = Batch(two_views().student)
    inputs = plain.to_inputs()
    assert sorted(inputs) == ["attention_mask", "input_ids", "labels"]
    assert all(isinstance(value, Tensor) for value in inputs.values())
    assert_same(Batch.from_inputs(inputs), plain)


@pytest.mark.parametrize("rows", [[1, 0], [1], [0, 1, 0]])
def test_weights_follow_their_rows(rows):
    """Prevents weights on other tokens after Accelerate slices a batch or repeats rows to fill the last one."""
    inputs = {name: value[rows] for name, value in two_views().to_inputs().items()}
    batch = Batch.from_inputs(inputs)
    weight_of = {5: 0.5, 6: 2.0, 7: 4.0}
    assert batch.token_weights.tolist() == [weight_of[target] for target in batch.student.targets.tolist()]


def test_a_weight_of_nothing_and_half_precision_survive():
    """Prevents a token that is weighted 0 from being taken for one that isn't learned."""
    batch = Batch(two_views().student, None, torch.tensor([0.0, 1.0, 0.0], dtype=torch.bfloat16))
    again = Batch.from_inputs(batch.to_inputs())
    assert again.token_weights.tolist() == [0.0, 1.0, 0.0]
    assert again.token_weights.dtype == torch.float32
    assert again.student.tokens == 3


def test_a_foreign_collator_is_told_what_is_missing():
    """Prevents a bare `KeyError: labels` deep inside a step, when the collator is the user's own."""
    inputs = two_views().to_inputs()
    del inputs["labels"]
    with pytest.raises(KeyError, match="labels.*collator"):
        Batch.from_inputs(inputs)
