"""Padding, and the promise that both views learn the same ids."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import DataLoader

from hfkd.batch import IGNORE, Batch
from hfkd.data.collate import DistillationCollator
from hfkd.data.prompts import PromptBuilder, PromptStyle
from hfkd.data.views import DistillationDataset
from hfkd.errors import NothingToLearn

PAD = 2


def view(prompt: list[int], answer: list[int]) -> dict:
    return {"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}


def examples() -> list[dict]:
    return [
        {"student": view([5], [7, 8, 2]), "teacher": view([9, 9, 9, 9, 5], [7, 8, 2]), "index": 0},
        {"student": view([5, 6, 6], [7]), "teacher": view([9, 9, 5, 6], [7]), "index": 1},
    ]


def test_right_padding() -> None:
    """Padding that is attended to, or learned, changes every gradient; here pad is also the end token."""
    batch = DistillationCollator(PAD)(examples())
    assert batch["input_ids"].tolist() == [[5, 7, 8, 2], [5, 6, 6, 7]]
    assert batch["teacher_input_ids"].tolist() == [[9, 9, 9, 9, 5, 7, 8, 2], [9, 9, 5, 6, 7, 2, 2, 2]]
    assert batch["teacher_attention_mask"].tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    assert batch["teacher_labels"].tolist() == [[-100] * 5 + [7, 8, 2], [-100] * 4 + [7] + [-100] * 3]
    assert batch["labels"].tolist() == [[-100, 7, 8, 2], [-100, -100, -100, 7]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_left_padding_and_multiples() -> None:
    """With prompts of different length, positions must count real tokens only (pitfall P23)."""
    inputs = DistillationCollator(PAD, "left", pad_to_multiple_of=5)(examples())
    assert inputs["input_ids"].tolist() == [[2, 5, 7, 8, 2], [2, 5, 6, 6, 7]]
    assert inputs["attention_mask"].tolist() == [[0, 1, 1, 1, 1]] * 2
    assert inputs["teacher_input_ids"].shape == (2, 10)
    batch = Batch.from_inputs(inputs)
    assert batch.teacher.position_ids[1].tolist() == [0] * 6 + [1, 2, 3, 4]
    assert batch.student.targets.tolist() == batch.teacher.targets.tolist() == [7, 8, 2, 7]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("style", ["text", "chat"])
def test_both_views_of_a_real_batch_learn_the_same_rows(tokenizer, side: str, style: str) -> None:
    """One row of the student against another row of the teacher is the bug of half the field (pitfall P20)."""
    words = ["go went", "eat ate", "see saw", "understand understood", "sing sang"]
    rows = [dict(zip(("prompt", "completion"), pair.split(), strict=True)) for pair in words]
    rows[3]["privileged_context"] = "a long one"
    builder = PromptBuilder(tokenizer, PromptStyle(style=style))
    data = DistillationDataset(rows[2:], builder, demonstrations=rows[:2], student_shots=(0, 1, 2))
    (inputs,) = DataLoader(data, batch_size=3, collate_fn=DistillationCollator(tokenizer.pad_token_id, side))
    batch = Batch.from_inputs(inputs)
    expected = [token for row in rows[2:] for token in builder.encode_completion(row)]
    assert batch.student.targets.tolist() == batch.teacher.targets.tolist() == expected
    for padded, prompts in ((batch.student, data.student_prompts), (batch.teacher, data.teacher_prompts)):
        for row in range(3):
            real = padded.input_ids[row][padded.attention_mask[row].bool()].tolist()
            assert real == prompts[row] + builder.encode_completion(rows[2 + row])


def test_without_teacher_views_there_are_no_teacher_keys() -> None:
    """Trainer would send an empty tensor to a teacher that reads the student's view."""
    features = [{**each, "teacher": None} for each in examples()]
    assert sorted(DistillationCollator(PAD)(features)) == ["attention_mask", "input_ids", "labels"]
    features[0] = examples()[0]
    with pytest.raises(ValueError, match="example 1 has no 'teacher' but others of its batch do"):
        DistillationCollator(PAD)(features)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"labels": [-100, 7, 6, 2]},
            r"example 0: .* differ first at position 1 .* has 6 and the teacher's 8 \(3 and 3",
        ),
        ({"labels": [-100, 7, 8, -100]}, r"differ first at position 2 .* has None and the teacher's 2 \(2 and 3"),
        ({"labels": [-100, -100, 7, 8]}, "position 2"),
        ({"labels": [7, 8, 2, -100]}, "position 0"),
    ],
)
def test_views_that_learn_other_ids_are_refused(change: dict, words: str) -> None:
    """Without this check a shifted label trains quietly towards the wrong distribution."""
    features = copy.deepcopy(examples())
    features[0]["student"].update(change)
    with pytest.raises(ValueError, match=words):
        DistillationCollator(PAD)(features)


@pytest.mark.parametrize("labels", [[-100] * 4, [5, -100, -100, -100]])
def test_an_example_without_anything_to_learn_is_loud(labels: list[int]) -> None:
    """A loss of exactly 0 looks like success; and nothing predicts position 0, so a label there doesn't count."""
    features = [{"student": {"input_ids": [5, 7, 8, 2], "labels": labels}, "teacher": None, "index": 17}]
    with pytest.raises(NothingToLearn, match="example 17: no token"):
        DistillationCollator(PAD)(features)


@pytest.mark.parametrize("side", ["right", "left"])
def test_token_weights_follow_their_tokens(side: str) -> None:
    """A weight that lands on the neighbour's token changes the loss in a way no curve shows."""
    features = examples()
    features[0]["token_weights"] = [0.0, 0.5, 1.0, 2.0]
    features[1]["token_weights"] = [9.0, 9.0, 9.0, 3.0]
    features[1]["student"] = view([5, 6, 6, 6], [7])
    features[1]["token_weights"].insert(0, 9.0)
    inputs = DistillationCollator(PAD, side)(features)
    assert inputs["token_weights"].shape == inputs["labels"].shape and inputs["token_weights"].dtype == torch.float32
    assert inputs["token_weights"][inputs["labels"] == IGNORE].abs().sum() == 0
    assert Batch.from_inputs(inputs).token_weights.tolist() == [0.5, 1.0, 2.0, 3.0]
    features[0]["token_weights"] = [1.0]
    with pytest.raises(ValueError, match="example 0: 1 token_weights for 4 tokens"):
        DistillationCollator(PAD)(features)
    del features[0]["token_weights"]
    with pytest.raises(ValueError, match="example 0 has no 'token_weights'"):
        DistillationCollator(PAD)(features)


def test_wrong_settings_are_refused() -> None:
    """A tokenizer without a padding token is common; a tensor of None fails far away."""
    with pytest.raises(ValueError, match="set tokenizer.pad_token"):
        DistillationCollator(None)
    with pytest.raises(ValueError, match="expected 'right' or 'left'"):
        DistillationCollator(PAD, "middle")
