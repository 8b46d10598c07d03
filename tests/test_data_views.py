"""The training set: two views, their limits, and the student's draws."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from torch.utils.data import DataLoader

from hfkd.batch import IGNORE
from hfkd.data.prompts import PromptBuilder, PromptStyle
from hfkd.data.views import DistillationDataset, shown_demonstrations, teacher_prompts

WORDS = ["go went", "eat ate", "see saw", "take took", "give gave", "sing sang", "write wrote", "walk walked"]
PAIRS = [dict(zip(("prompt", "completion"), pair.split(), strict=True)) for pair in WORDS]
DEMONSTRATIONS, ROWS = PAIRS[:4], PAIRS[4:]
CONTEXT = [row | {"privileged_context": f"It ends in {row['completion'][-1]}."} for row in ROWS]


def dataset(tokenizer, rows=ROWS, style: str = "text", **settings) -> DistillationDataset:
    settings = {"demonstrations": DEMONSTRATIONS, "student_shots": (0, 1)} | settings
    return DistillationDataset(rows, PromptBuilder(tokenizer, PromptStyle(style=style)), **settings)


def learned(view: dict) -> list[int]:
    return [label for label in view["labels"] if label != IGNORE]


@pytest.mark.parametrize("style", ["text", "chat"])
def test_the_two_views_of_an_example(tokenizer, style: str) -> None:
    """The teacher must read all demonstrations in their order, the student those drawn, both the same answer."""
    data = dataset(tokenizer, style=style)
    builder = data.builder
    assert len(data) == len(ROWS) and data.second_view
    for index, row in enumerate(ROWS):
        example = data[index]
        assert example["index"] == index
        teacher = builder.encode_prompt(row, DEMONSTRATIONS)
        student = builder.encode_prompt(row, data.drawn(index))
        assert example["teacher"]["input_ids"] == teacher + builder.encode_completion(row)
        assert example["student"]["input_ids"] == student + builder.encode_completion(row)
        assert learned(example["student"]) == learned(example["teacher"]) == builder.encode_completion(row)
        assert data.teacher_prompts[index] == teacher and data.student_prompts[index] == student
    assert data.teacher_prompts == teacher_prompts(ROWS, builder, DEMONSTRATIONS)


def test_rows_may_be_an_arrow_table(tokenizer) -> None:
    """Arrow fills absent columns with None, which must not be taken for values."""
    rows = datasets.Dataset.from_list([CONTEXT[0], {**ROWS[1], "privileged_context": None}])
    data = dataset(tokenizer, rows)
    assert [example["teacher"] for example in data] == [
        example["teacher"] for example in dataset(tokenizer, [CONTEXT[0], ROWS[1]])
    ]
    assert data[-1] == data[1]
    with pytest.raises(IndexError):
        data[2]


def test_privileged_context_alone_is_a_second_view(tokenizer) -> None:
    """A hint that only the teacher reads needs no demonstrations."""
    data = dataset(tokenizer, CONTEXT, demonstrations=(), student_shots=(0,))
    example = data[0]
    assert data.second_view
    assert tokenizer.decode(example["teacher"]["input_ids"]).startswith("It ends in e.\n\nQuestion: give")
    assert tokenizer.decode(example["student"]["input_ids"]).startswith("Question: give")


def test_a_self_teacher_without_a_second_prompt_can_be_told(tokenizer) -> None:
    """A self-teacher that reads the student's prompt has nothing to teach: its loss is 0 at the start."""
    same = dataset(tokenizer, demonstrations=(), student_shots=(0,))
    assert not same.second_view and same[0]["teacher"] is None and same.teacher_prompts == []
    one = {"demonstrations": DEMONSTRATIONS[:1]}
    assert not dataset(tokenizer, student_shots=(1,), **one).second_view
    assert dataset(tokenizer, student_shots=(0, 1), **one).second_view
    assert dataset(tokenizer, student_shots=(1, 0, 1), **one).second_view
    assert dataset(tokenizer, student_shots=(4,)).second_view
    assert not dataset(tokenizer, teacher_view=False).second_view
    assert dataset(tokenizer, teacher_view=False)[0]["teacher"] is None


def test_shared_prefix_is_shared_by_all_and_shorter_than_each(tokenizer) -> None:
    """If the prefix swallowed a whole prompt, the row that predicts the first answer token would be lost."""
    data = dataset(tokenizer)
    prefix = data.shared_prefix
    prompts = data.teacher_prompts
    assert all(prompt[: len(prefix)] == prefix and len(prompt) > len(prefix) for prompt in prompts)
    assert len({prompt[len(prefix)] for prompt in prompts}) > 1
    shown = tokenizer(data.builder.prompt(ROWS[0], DEMONSTRATIONS).rpartition("Question: ")[0])["input_ids"]
    assert len(prefix) >= len(shown) and all(isinstance(token, int) for token in prefix)
    single = dataset(tokenizer, ROWS[:1])
    assert single.shared_prefix == single.teacher_prompts[0][:-1]
    twice = dataset(tokenizer, [ROWS[0], ROWS[0]])
    assert twice.shared_prefix == twice.teacher_prompts[0][:-1]


def test_shared_prefix_of_the_view_that_the_teacher_reads(tokenizer) -> None:
    """A prefix of views that change with the draws would be wrong at the next visit."""
    assert dataset(tokenizer, teacher_view=False).shared_prefix == []
    fixed = dataset(tokenizer, teacher_view=False, student_shots=(0,))
    assert (
        fixed.shared_prefix
        and fixed.shared_prefix == dataset(tokenizer, demonstrations=(), student_shots=(0,)).shared_prefix
    )
    assert fixed.student_prompts[0][: len(fixed.shared_prefix)] == fixed.shared_prefix
    whole = dataset(tokenizer, teacher_view=False, student_shots=(0,), whole_text=True)
    assert whole.shared_prefix == []


# draws


def draws(data: DistillationDataset) -> list[list[str]]:
    return [[shown["prompt"] for shown in data.drawn(index)] for index in range(len(data))]


def test_draws_are_fresh_at_each_visit_and_a_function_of_the_seed(tokenizer) -> None:
    """The released SeCoKD code draws once for all epochs; and a draw from global state can't be resumed."""
    data = dataset(tokenizer, PAIRS[4:] * 3, student_shots=(0, 1, 3))
    first = draws(data)
    assert draws(data) == first == draws(dataset(tokenizer, PAIRS[4:] * 3, student_shots=(0, 1, 3)))
    data.set_epoch(1)
    assert data.epoch == 1 and draws(data) != first
    data.set_epoch(0)
    assert draws(data) == first
    assert draws(dataset(tokenizer, PAIRS[4:] * 3, student_shots=(0, 1, 3), seed=1)) != first
    assert {len(drawn) for drawn in first} == {0, 1, 3}
    assert all(len(set(drawn)) == len(drawn) for drawn in first)


def test_all_demonstrations_and_shots_come_up(tokenizer) -> None:
    """A draw that always picks the first ones would train on one demonstration."""
    data = dataset(tokenizer)
    seen: set[tuple[str, ...]] = set()
    for epoch in range(40):
        data.set_epoch(epoch)
        seen |= {tuple(drawn) for drawn in draws(data)}
    assert seen == {(), *((shown["prompt"],) for shown in DEMONSTRATIONS)}


def test_draws_do_not_depend_on_the_process(tokenizer) -> None:
    """Python's own hash of strings changes from process to process; two ranks would draw for different examples."""
    script = (
        "import json, random\n"
        "from tests.conftest import make_tokenizer\nfrom tests.test_data_views import dataset, draws\n"
        "random.seed(5)\ndata = dataset(make_tokenizer())\ndata.set_epoch(3)\nprint(json.dumps(draws(data)))"
    )
    root = Path(__file__).resolve().parent.parent
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True, timeout=120
    )
    data = dataset(tokenizer)
    data.set_epoch(3)
    assert json.loads(out.stdout) == draws(data)


def test_running_workers_see_the_new_epoch(tokenizer) -> None:
    """Persistent workers hold a copy of the data set; without shared memory they would draw as in epoch 0 for ever."""
    data = dataset(tokenizer)
    loader = DataLoader(
        data,
        batch_size=None,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="fork",
        prefetch_factor=1,
    )
    for epoch in range(3):
        data.set_epoch(epoch)
        loaded = [example["student"]["input_ids"] for example in loader]
        assert loaded == [data[index]["student"]["input_ids"] for index in range(len(data))]
    data.set_epoch(0)
    assert loaded != [data[index]["student"]["input_ids"] for index in range(len(data))]


# demonstrations


def test_more_shots_than_demonstrations_is_an_error(tokenizer) -> None:
    """Showing fewer than asked for would report results for another setting."""
    with pytest.raises(
        ValueError, match="training row 0: student_shots asks for 5 demonstrations but there are 4; lower"
    ):
        dataset(tokenizer, student_shots=(0, 5))
    for shots in ((), (-1,), (0.5,), (True,)):
        with pytest.raises(ValueError, match="expected numbers of demonstrations"):
            dataset(tokenizer, student_shots=shots)


def test_a_row_among_the_demonstrations_is_not_trained_on(tokenizer) -> None:
    """The teacher would copy the answer from its own prompt, and skipping it there would break the shared prefix."""
    data = dataset(tokenizer, [ROWS[0], {"prompt": " GO ", "completion": "went"}, ROWS[1]])
    assert len(data) == 2 and data.dropped_demonstrations == 1 and data.dropped == 0
    assert tokenizer.decode(learned(data[1]["student"])) == f" {ROWS[1]['completion']}\n"
    with pytest.raises(ValueError, match="none of 4 training rows is left: .* 4 are demonstrations"):
        dataset(tokenizer, DEMONSTRATIONS)


def test_a_row_may_bring_its_own_demonstrations(tokenizer) -> None:
    """Retrieved demonstrations differ from row to row; the row itself among them would give the answer away."""
    own = ROWS[0] | {"demonstrations": [DEMONSTRATIONS[0], ROWS[0], DEMONSTRATIONS[1]]}
    assert shown_demonstrations(own, DEMONSTRATIONS) == DEMONSTRATIONS[:2]
    data = dataset(tokenizer, [own, ROWS[1], DEMONSTRATIONS[3] | {"demonstrations": DEMONSTRATIONS[:2]}])
    assert data.teacher_prompts[0] == data.builder.encode_prompt(ROWS[0], DEMONSTRATIONS[:2])
    assert data.teacher_prompts[1] == data.builder.encode_prompt(ROWS[1], DEMONSTRATIONS)
    assert len(data) == 3
    for epoch in range(10):
        data.set_epoch(epoch)
        assert all(shown in DEMONSTRATIONS[:2] for shown in data.drawn(0))
    with pytest.raises(ValueError, match="training row 1: student_shots asks for 3"):
        dataset(tokenizer, [ROWS[0], own], student_shots=(3,))


# limits


@pytest.mark.parametrize("style", ["text", "chat"])
def test_the_student_is_measured_with_the_longest_draw(tokenizer, style: str) -> None:
    """A limit that only a rare draw breaks would stop a run in the middle."""
    long = {"prompt": "understand " * 20, "completion": "understood"}
    shown = [*DEMONSTRATIONS[:2], long, *DEMONSTRATIONS[2:]]
    builder = PromptBuilder(tokenizer, PromptStyle(style=style))
    worst = max(len(builder.encode_prompt(row, [long]) + builder.encode_completion(row)) for row in ROWS)
    data = dataset(tokenizer, style=style, demonstrations=shown, max_length=worst, teacher_max_length=2048)
    for epoch in range(20):
        data.set_epoch(epoch)
        assert max(len(example["student"]["input_ids"]) for example in data) <= worst
    words = f"training row .: the student's view has {worst} tokens with the longest .*max_length={worst - 1}; raise"
    with pytest.raises(ValueError, match=words):
        dataset(tokenizer, style=style, demonstrations=shown, max_length=worst - 1, teacher_max_length=2048)


def test_each_view_has_its_own_limit_and_nothing_is_cut(tokenizer) -> None:
    """Cutting the teacher's prompt to the student's limit loses the demonstrations first (pitfall P22)."""
    with pytest.raises(ValueError, match="row 0: the teacher's view has .* the limit is teacher_max_length=30; raise"):
        dataset(tokenizer, teacher_max_length=30)
    with pytest.raises(ValueError, match="the limit is teacher_max_length=55"):
        dataset(tokenizer, max_length=55)
    data = dataset(tokenizer, max_length=55, teacher_max_length=400)
    assert min(len(example["teacher"]["input_ids"]) for example in data) > 55


def test_groups_are_those_of_the_rows_that_are_kept(tokenizer) -> None:
    """A domain that is called "None" is one, and a row that is dropped has no say in which ones there are."""
    rows = [row | {"domain": name} for row, name in zip(ROWS, ["None", "a", "a", "None"], strict=True)]
    data = dataset(tokenizer, rows)
    assert data.groups == ["None", "a"] and [data[index]["group"] for index in range(4)] == [0, 1, 1, 0]
    long = {"prompt": "x" * 200, "completion": "y"}
    for dropped in (long, long | {"domain": "z"}, DEMONSTRATIONS[0]):
        data = dataset(tokenizer, [*rows, dropped], max_length=100, teacher_max_length=150, too_long="drop")
        assert len(data) == 4 and data.groups == ["None", "a"]
    assert not dataset(tokenizer, [*rows[1:], ROWS[0] | {"domain": None}]).groups


def test_too_long_examples_are_dropped_and_counted(tokenizer) -> None:
    """Dropping in silence trains on less data than the user thinks."""
    long = {"prompt": "understand " * 40, "completion": "understood"}
    data = dataset(tokenizer, [ROWS[0], long, ROWS[1]], max_length=100, teacher_max_length=150, too_long="drop")
    assert (len(data), data.dropped) == (2, 1)
    assert tokenizer.decode(learned(data[1]["teacher"])) == f" {ROWS[1]['completion']}\n"
    assert data[1]["index"] == 1
    with pytest.raises(ValueError, match=r"none of 1 training rows is left: 1 are longer than max_length=100"):
        dataset(tokenizer, [long], max_length=100, too_long="drop")
    with pytest.raises(ValueError, match="expected 'raise' or 'drop'"):
        dataset(tokenizer, too_long="cut")


def test_empty_and_unwritable_rows_name_themselves(tokenizer) -> None:
    """The number of the row is what a user needs to find it among thousands."""
    with pytest.raises(ValueError, match="training set is empty"):
        dataset(tokenizer, [])
    with pytest.raises(ValueError, match="training row 1: a row has no 'completion'"):
        dataset(tokenizer, [ROWS[0], {"prompt": "a", "completion": None}])


def test_whole_text_excludes_a_second_view(tokenizer) -> None:
    """Learning the student's prompt from a teacher that reads another prompt compares rows of different tokens."""
    with pytest.raises(ValueError, match="whole_text .* set data.whole_text to false"):
        dataset(tokenizer, whole_text=True)
    data = dataset(tokenizer, whole_text=True, teacher_view=False)
    view = data[0]["student"]
    assert view["labels"] == [IGNORE, *view["input_ids"][1:]]
    assert dataset(tokenizer, whole_text=True, demonstrations=(), student_shots=(0,))[0]["teacher"] is None


def test_the_longest_prompts_are_those_of_any_draw(tokenizer) -> None:
    """Room for an answer that was measured with a short draw, or before an earlier answer, is not there later."""
    data = dataset(tokenizer, CONTEXT)
    longest = max(
        len(data.builder.encode_prompt(row, [shown])) for row in CONTEXT for shown in DEMONSTRATIONS
    )  # any of them can be drawn
    assert data.longest_prompts == {"student": longest, "teacher": max(map(len, data.teacher_prompts))}
    for epoch in range(4):
        data.set_epoch(epoch)
        assert max(map(len, data.student_prompts)) <= longest
    turns = [["user", "go"], ["assistant", "went"], ["user", "sing"], ["assistant", "sang"]]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    talk = dataset(tokenizer, rows, demonstrations=[], student_shots=[0], teacher_view=False)
    length = len(talk.builder.encode_prompt(rows[0]))
    assert talk.longest_prompts == {"student": length, "teacher": length} and length > len(talk.student_prompts[0])


def test_rows_that_are_held_out_are_not_called_training_rows(tokenizer) -> None:
    """Who looks for the fault in the training file looks in the wrong one."""
    for wrong, settings, words in (
        ([{"prompt": "run"}], {}, "held-out row 0: a row has no 'completion'"),
        (ROWS, {"max_length": 5}, "held-out row 0: the student's view has"),
        (ROWS, {"max_length": 5, "too_long": "drop"}, "none of 4 held-out rows is left"),
        ([], {}, "the held-out set is empty$"),
    ):
        with pytest.raises(ValueError, match=words):
            dataset(tokenizer, wrong, name="held-out", **settings)


def test_conversations_with_several_turns(tokenizer) -> None:
    """All assistant turns of a row are learned in both views, behind demonstrations that are not."""
    turns = [["user", "go"], ["assistant", "went"], ["user", "sing"], ["assistant", "sang"]]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    data = dataset(tokenizer, rows, demonstrations=DEMONSTRATIONS[1:])
    example = data[0]
    assert learned(example["student"]) == learned(example["teacher"])
    assert tokenizer.decode(learned(example["teacher"])) == "went<|im_end|>\nsang<|im_end|>\n"
    assert (
        data.teacher_prompts[0]
        == example["teacher"]["input_ids"][: example["teacher"]["labels"].index(learned(example["teacher"])[0])]
    )
