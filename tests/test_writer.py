"""Texts written during training: who writes those of a step, and what becomes of its batches."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from training import DEMONSTRATIONS, ROWS

from hfkd.batch import IGNORE, Batch
from hfkd.data.collate import DistillationCollator
from hfkd.data.prompts import PromptBuilder, PromptStyle
from hfkd.data.views import DistillationDataset
from hfkd.errors import NothingToLearn
from hfkd.rollout import Completion, GenerationSettings, HFRollout, Mixture, OffPolicyBuffer, Rollout, Writer
from hfkd.rollout.texts import Text

PAD = 2
SETTINGS = GenerationSettings(max_new_tokens=16, stop=("\n",))


class Scripted(Rollout):
    """Answers each prompt with a text that is fixed by a function of the prompt's ids, and notes how it was called."""

    def __init__(self, answer, settings: GenerationSettings = SETTINGS) -> None:
        self.answer, self.settings = answer, settings
        self.calls: list[list[list[int]]] = []
        self.seeds: list[int] = []

    def generate(self, model, prompts, description=None):
        """See `Rollout.generate`."""
        self.calls.append([list(prompt) for prompt in prompts])
        self.seeds.append(self.settings.seed)
        return [self.answer(tuple(prompt)) for prompt in prompts]


def ending_in(suffix: str = "ing", tokenizer=None) -> Scripted:
    """Writes the asked word with another ending, behind the default prompts in text style."""
    tokenizer = tokenizer or make_tokenizer()

    def answer(prompt: tuple[int, ...]) -> Completion:
        word = tokenizer.decode(list(prompt)).rsplit("Question: ", 1)[1].split("\n")[0]
        text = f" {word}{suffix}"
        return Completion(tokenizer(text + "\n")["input_ids"], text, True)

    return Scripted(answer)


def always(ids: list[int], text: str, finished: bool = True) -> Scripted:
    """Writes the same behind every prompt."""
    return Scripted(lambda prompt: Completion(list(ids), text, finished))


def views(rows=ROWS[:8], style: str = "text", **settings) -> DistillationDataset:
    """Rows as examples; the teacher reads four demonstrations, the student none."""
    settings = {"demonstrations": DEMONSTRATIONS} | settings
    return DistillationDataset(rows, PromptBuilder(make_tokenizer(), PromptStyle(style=style)), **settings)


def batches_of(dataset, size: int = 4, side: str = "right", **settings) -> list[dict]:
    """The examples of a data set in order, as the collator gives them."""
    collate = DistillationCollator(PAD, side, **settings)
    examples = [dataset[index] for index in range(len(dataset))]
    return [collate(examples[start : start + size]) for start in range(0, len(examples), size)]


def writer(mixture="student", rollout=None, **settings) -> Writer:
    """A writer whose models are never looked at."""
    settings = {"student": lambda: nullcontext("student"), "teacher": lambda: nullcontext("teacher")} | settings
    return Writer(mixture, rollout or ending_in(), pad_id=PAD, **settings)


def rows_of(batch: dict, view: str = "") -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each row, without padding."""
    columns = (batch[f"{view}{name}"].tolist() for name in ("input_ids", "attention_mask", "labels"))
    rows = []
    for ids, mask, labels in zip(*columns, strict=True):
        assert all(label == IGNORE for label, kept in zip(labels, mask, strict=True) if not kept)
        rows.append(
            (
                [token for token, kept in zip(ids, mask, strict=True) if kept],
                [label for label, kept in zip(labels, mask, strict=True) if kept],
            )
        )
    return rows


# --- who writes


@pytest.mark.parametrize(
    ("answer", "shares"),
    [
        ("student", {"student": 1.0}),
        ("dataset", {"dataset": 1.0}),
        ({"student": 1, "dataset": 3}, {"dataset": 0.75, "student": 0.25}),
        ({"teacher": 0.5, "student": 0, "dataset": 0.5}, {"dataset": 0.5, "teacher": 0.5}),
    ],
)
def test_shares_are_read(answer, shares):
    """A share that is read wrongly trains on other text than the recipe says."""
    mixture = Mixture.of(answer)
    assert mixture.shares == shares and list(mixture.shares) == list(shares)
    assert mixture.writes == (answer != "dataset")
    assert Mixture.of(mixture) is mixture


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("studnet", "names 'studnet'"),
        ({"student": 0.5, "gold": 0.5}, "names 'gold'"),
        ({"student": -0.1, "dataset": 1}, "share of student in answer is -0.1"),
        ({"student": float("nan")}, "share of student"),
        ({"student": True}, "share of student in answer is True"),
        ({"student": 0, "dataset": 0}, "All shares of answer are 0"),
        ({}, "expected one of dataset, student, teacher"),
        (0.5, "expected one of dataset, student, teacher"),
    ],
)
def test_impossible_shares_are_refused(answer, words):
    """A typo must not be taken for a share of nothing."""
    with pytest.raises(ValueError, match=words):
        Mixture.of(answer)


def test_draws_are_near_their_shares_and_the_same_everywhere():
    """Processes that draw apart train apart, or wait for each other; draws off their shares are another recipe."""
    mixture = Mixture.of({"student": 0.5, "dataset": 0.3, "teacher": 0.2})
    drawn = [mixture.draw(7, step) for step in range(4000)]
    counts = Counter(drawn)
    for name, share in mixture.shares.items():
        assert counts[name] / 4000 == pytest.approx(share, abs=0.025)
    torch.manual_seed(1)
    assert [Mixture.of({"teacher": 2, "dataset": 3, "student": 5}).draw(7, step) for step in range(4000)] == drawn
    assert [mixture.draw(8, step) for step in range(100)] != drawn[:100]


def test_a_share_of_nothing_never_fires():
    """A `<=` in the draw lets a source with share 0 fire."""
    for answer, only in (("dataset", "dataset"), ({"student": 1, "dataset": 0}, "student")):
        assert {Mixture.of(answer).draw(seed, step) for seed in range(3) for step in range(2000)} == {only}


def test_a_writer_that_could_not_write_is_refused():
    """The first step of the student's, hours into a run, is too late to find that nobody can write."""

    class Engine(Scripted):
        any_model = False

    engine = Engine(lambda prompt: Completion([5], "a", True))
    with pytest.raises(ValueError, match="no rollout"):
        Writer("student", None, student=nullcontext)
    with pytest.raises(ValueError, match="no teacher whose weights"):
        writer("teacher", teacher=None)
    with pytest.raises(ValueError, match="the student's weights only"):
        writer({"teacher": 0.1, "dataset": 0.9}, engine)
    with pytest.raises(ValueError, match="never lets it"):
        writer("teacher", buffer=OffPolicyBuffer(8, 0.5))
    with pytest.raises(TypeError, match="rollout is a function; expected an object of a subclass of hfkd.Rollout"):
        writer("student", test_a_share_of_nothing_never_fires)
    writer("student", engine)
    Writer("dataset", None, student=nullcontext)


# --- what becomes of the batches


def test_the_data_sets_turn_changes_nothing():
    """Batches that were copied or marked would skip cross-entropy where it is wanted."""
    batches = batches_of(views())
    rollout = ending_in()
    same = writer("dataset", rollout)
    assert all(new is old for new, old in zip(same.rewrite(batches, 0), batches, strict=True))
    assert not rollout.calls and same.figures()["rollout/own_text"] == (0.0, 1.0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("source", ["student", "teacher"])
def test_both_views_learn_the_new_answer_behind_their_own_prompts(source, side, tokenizer):
    """A view that keeps its old answer, or the other one's prompt, would teach row i by another token."""
    data = views()
    rollout = ending_in("ing")
    old = batches_of(data, side=side, pad_to_multiple_of=8)
    new = writer(source, rollout).rewrite(old, 0)
    prompts = {"": data.student_prompts, "teacher_": data.teacher_prompts}
    assert sorted(rollout.calls[0]) == sorted(prompts["" if source == "student" else "teacher_"])
    assert len(rollout.calls) == 1, "one call for all micro-batches of the step"
    for number, batch in enumerate(new):
        assert batch["own_text"] is (source == "student")
        assert Batch.from_inputs(batch).own_text is (source == "student")
        for view in ("", "teacher_"):
            mask = batch[f"{view}attention_mask"]
            assert bool((mask[:, -1 if side == "left" else 0] == 1).all()) and not bool(mask.all())
            for row, (ids, labels) in enumerate(rows_of(batch, view)):
                index = 4 * number + row
                prompt = prompts[view][index]
                answer = tokenizer(f" {data.row(index)['prompt']}ing\n")["input_ids"]
                assert ids == prompt + answer
                assert labels == [IGNORE] * len(prompt) + answer
        for name in ("input_ids", "attention_mask", "labels"):
            assert batch[name].dtype == old[number][name].dtype
        both = Batch.from_inputs(batch)
        assert torch.equal(both.student.targets, both.teacher.targets)


def test_one_view_is_enough_where_both_read_the_same():
    """A teacher's view that appears from nowhere costs a second forward, or fails."""
    batch = writer().rewrite(batches_of(views(demonstrations=(), teacher_view=False)), 0)[0]
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "own_text"]


def test_types_and_routes_are_kept_and_weights_are_not(caplog):
    """Weights of gold tokens on other tokens weigh at random; a lost route asks the wrong teacher."""
    batches = batches_of(views())
    for batch in batches:
        batch["token_weights"] = torch.ones_like(batch["labels"]).float()
        batch["route"] = torch.tensor([1, 0, 1, 1])
        batch["labels"], batch["attention_mask"] = batch["labels"].int(), batch["attention_mask"].bool()
    one = writer()
    with caplog.at_level(logging.WARNING):
        new = one.rewrite(batches, 0)
        one.rewrite(batches, 1)
    assert [record.message.startswith("token_weights") for record in caplog.records] == [True]
    assert "token_weights" not in new[0] and new[0]["route"].tolist() == [1, 0, 1, 1]
    assert new[0]["labels"].dtype == torch.int32 and new[0]["attention_mask"].dtype == torch.bool
    assert new[0]["route"].dtype == torch.int64


def test_of_several_turns_the_last_is_written():
    """An answer in the middle of a dialogue can't be replaced: what follows answers to it."""
    turns = [
        {"role": "user", "content": "walk"},
        {"role": "assistant", "content": "walked"},
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "went"},
    ]
    data = views([{"messages": turns}, {"messages": turns[2:]}], "chat", demonstrations=())
    old = batches_of(data, 2)
    (_, before), _ = rows_of(old[0])
    spans = sum(1 for place, label in enumerate(before) if label != IGNORE and before[place - 1] == IGNORE)
    assert spans == 2, "want a row with two supervised turns"
    new = writer("student", always([7, 8], "ab")).rewrite(old, 0)[0]
    for (ids, labels), (was, learned) in zip(rows_of(new), rows_of(old[0]), strict=True):
        last = len(was) - was[::-1].index(make_tokenizer()("went")["input_ids"][-1]) - 1
        start = max(place for place in range(last + 1) if learned[place] != IGNORE and learned[place - 1] == IGNORE)
        assert ids == was[:start] + [7, 8] and labels == [IGNORE] * start + [7, 8]


def test_masked_rows_stay_masked_and_answers_without_a_token_learn_nothing():
    """A row that was masked on purpose must not be asked; an answer of no ids must not break the batch."""
    batches = batches_of(views())
    for view in ("", "teacher_"):
        batches[0][f"{view}labels"][1] = IGNORE
    old = rows_of(batches[0])
    rollout = ending_in()
    silent = tuple(views().student_prompts[2])
    say = rollout.answer
    rollout.answer = lambda prompt: Completion([], "", False) if prompt == silent else say(prompt)
    one = writer("student", rollout)
    new = one.rewrite(batches, 0)
    assert sum(map(len, rollout.calls)) == 7
    rows = rows_of(new[0])
    assert rows[1] == (old[1][0], [IGNORE] * len(old[1][0]))
    assert rows[2] == (list(silent), [IGNORE] * len(silent))
    assert one.figures()["rollout/empty"] == (1.0, 7.0) and one.figures()["rollout/length"][1] == 7.0
    for view in ("", "teacher_"):
        for batch in batches:
            batch[f"{view}labels"].fill_(IGNORE)
    new = one.rewrite(batches, 1)
    assert all(bool((batch["labels"] == IGNORE).all()) for batch in new) and len(new) == 2
    assert one.figures()["rollout/cut"] == (0.0, 0.0)


def test_batches_that_have_no_prompt_are_refused():
    """A whole text as the answer would be replaced by one without a question."""
    batch = batches_of(views(demonstrations=(), teacher_view=False))[0]
    with pytest.raises(ValueError, match="no prompt to write behind"):
        writer().rewrite([{**batch, "labels": batch["input_ids"].clone()}], 0)
    with pytest.raises(ValueError, match="another tokenizer"):
        writer().rewrite([{**batch, "student_span": batch["labels"]}], 0)
    batch = batches_of(views())[0]
    batch["teacher_labels"][1] = IGNORE
    with pytest.raises(ValueError, match="Row 1 .* student's view alone"):
        writer().rewrite([batch], 0)


def test_a_rollout_that_answers_too_little_is_refused():
    """Answers that slip by one row teach every question another's answer."""
    rollout = ending_in()
    rollout.generate = lambda model, prompts, description=None: []
    with pytest.raises(ValueError, match="Scripted gave 0 completions for 8 prompts"):
        writer("student", rollout).rewrite(batches_of(views()), 0)


# --- samples


def test_samples_change_with_the_step_and_with_nothing_else(tokenizer):
    """Samples that follow the batch can't be had again on another machine; the same at each step are no samples."""
    rows = [*ROWS[:6], ROWS[0], ROWS[2]]  # equal prompts, which other batches and processes would number otherwise
    data, model = views(rows), make_model(seed=0)

    def texts(step: int, size: int, seed: int = 0, order=slice(None), batch_size: int = 8) -> list[list[int]]:
        settings = GenerationSettings(max_new_tokens=6, temperature=1.5, batch_size=batch_size)
        rollout = HFRollout(tokenizer, settings)
        one = writer("student", rollout, student=lambda: nullcontext(model), seed=seed)
        new = one.rewrite(batches_of(data, size)[order], step)
        assert rollout.settings is settings
        return [ids for batch in new for ids, _ in rows_of(batch)]

    first = texts(0, 8)
    assert texts(0, 2, batch_size=3) == first
    assert texts(0, 4, order=slice(0, 1)) + texts(0, 4, order=slice(1, 2)) == first, "two processes"
    assert texts(1, 8) != first and texts(0, 8, seed=1) != first
    assert first[0] == first[6] and first[0] != first[1]


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
def test_the_model_is_left_in_training(tokenizer):
    """A student that was left in eval mode, with its cache or without checkpointing, trains otherwise from then on."""
    model = make_model(seed=0).train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    flags = [(module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    state = torch.get_rng_state()
    rollout = HFRollout(tokenizer, GenerationSettings(max_new_tokens=3, temperature=1.0))
    writer("student", rollout, student=lambda: nullcontext(model)).rewrite(batches_of(views()), 0)
    after = [(module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    assert after == flags and model.config.use_cache is False
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.grad is not None for parameter in model.parameters())


# --- what goes wrong


def test_three_blank_steps_are_the_end(tokenizer):
    """A stop string at the beginning of each answer would train on nothing for hours."""
    one = writer("student", always(tokenizer("\n")["input_ids"], ""))
    batches = batches_of(views())
    one.rewrite(batches, 0)
    one.rewrite(batches, 1)
    assert one.figures()["rollout/empty"] == (8.0, 8.0)
    with pytest.raises(NothingToLearn, match=r"3 steps in a row .*stop=\['\\n'\], max_new_tokens=16"):
        one.rewrite(batches, 2)


def test_two_blank_steps_are_not():
    """A single good text shows that the model can write."""
    rollout = ending_in()
    say, blank = rollout.answer, Completion([], "", False)
    one = writer("student", rollout)
    for step in range(9):
        rollout.answer = (lambda prompt: blank) if step % 3 else say
        one.rewrite(batches_of(views()), step)


def test_answers_that_never_end_are_told_once(caplog):
    """Torn texts cost the most time and teach no end; without the share nobody sees it."""
    one = writer("student", always([7] * 16, "a" * 16, finished=False))
    batches = batches_of(views())
    with caplog.at_level(logging.WARNING):
        for step in range(9):
            one.rewrite(batches, step)
        assert not caplog.records
        for step in range(9, 25):
            one.rewrite(batches, step)
    assert len(caplog.records) == 1
    assert "80 answers written in the last 10 steps 80 (100%)" in caplog.records[0].message
    assert "max_new_tokens=16" in caplog.records[0].message
    assert one.figures()["rollout/cut"] == (8.0, 8.0) and one.figures()["rollout/length"] == (128.0, 8.0)


# --- old texts


def test_old_texts_are_learned_again(tokenizer):
    """A buffer that mixes up prompts and answers, or the two views, teaches nonsense."""
    rollout = ending_in()
    buffer = OffPolicyBuffer(32, 0.5)
    one = writer("student", rollout, buffer=buffer, seed=3)
    first, second = batches_of(views(ROWS[:8])), batches_of(views(ROWS[8:16]))
    assert not buffer.reuses(3, 0)
    kept = one.rewrite(first, 0)
    step = next(step for step in range(1, 50) if buffer.reuses(3, step))
    new = one.rewrite(second, step)
    assert len(rollout.calls) == 1 and one.figures()["rollout/from_buffer"] == (1.0, 1.0)
    assert one.figures()["rollout/cut"] == (0.0, 0.0) and one.figures()["rollout/length"][1] == 8.0
    for view in ("", "teacher_"):
        old = sorted(row for batch in kept for row in rows_of(batch, view))
        assert sorted(row for batch in new for row in rows_of(batch, view)) == old
    for batch in new:
        both = Batch.from_inputs(batch)
        assert both.own_text and torch.equal(both.student.targets, both.teacher.targets)
    step = next(step for step in range(1, 50) if not buffer.reuses(3, step))
    one.rewrite(second, step)
    assert len(rollout.calls) == 2 and len(buffer) == 16


def test_reuse_is_drawn_near_its_share_and_alike():
    """Processes that decide apart would wait for each other in a generation that all must join."""
    one, two = OffPolicyBuffer(8, 0.3), OffPolicyBuffer(64, 0.3)
    one.add([]), two.add([])  # one kept nothing, still both count the step
    drawn = [one.reuses(5, step) for step in range(4000)]
    assert sum(drawn) / 4000 == pytest.approx(0.3, abs=0.025)
    assert drawn == [two.reuses(5, step) for step in range(4000)]
    never = OffPolicyBuffer(8, 0.0)
    never.add([Text([1], None, []), Text([1], None, [2])])
    assert len(never) == 1, "a text without an answer teaches nothing"
    assert not any(never.reuses(5, step) for step in range(4000))


def test_a_buffer_is_what_it_was_after_a_resume(tmp_path):
    """A resumed run that draws other texts is another run."""
    buffer = OffPolicyBuffer(12, 0.5)
    rollout = ending_in()
    one = writer("student", rollout, buffer=buffer)
    for step, rows in enumerate((ROWS[:8], ROWS[8:16])):
        batches = batches_of(views(rows))
        if step:
            for batch in batches:
                batch["route"] = torch.tensor([0, 1, 0, 1])
        buffer.reuse = 0.0
        one.rewrite(batches, step)
    save_file(one.state_dict(), tmp_path / "texts.safetensors")
    fresh = OffPolicyBuffer(12, 0.5)
    other = writer("student", rollout, buffer=fresh)
    save_file(other.state_dict(), tmp_path / "empty.safetensors")
    other.load_state_dict(load_file(tmp_path / "texts.safetensors"))
    assert fresh.steps == 2 and len(fresh) == 12
    assert fresh.draw(12, 0, 5) == buffer.draw(12, 0, 5) and fresh.draw(12, 0, 5) != buffer.draw(12, 0, 6)
    assert {text.route for text in fresh.draw(12, 0, 0)} == {None, 0, 1}
    small = OffPolicyBuffer(4, 0.5)
    small.load_state_dict(load_file(tmp_path / "texts.safetensors"))
    assert small.draw(4, 0, 0) and {text.route for text in small.draw(4, 0, 0)} == {0, 1}, "the newest stay"
    other.load_state_dict(load_file(tmp_path / "empty.safetensors"))
    assert len(fresh) == 0 and fresh.steps == 0 and fresh.draw(3, 0, 0) == []
    assert {name.split(".")[0] for name in writer().state_dict()} == {"watch"}


@pytest.mark.parametrize(
    ("size", "reuse", "words"), [(0, 0.5, "buffer_size is 0"), (8, 1.0, "reuse is 1.0"), (8, -0.1, "reuse is -0.1")]
)
def test_impossible_buffers_are_refused(size, reuse, words):
    """A student that never writes again learns its first texts by heart."""
    with pytest.raises(ValueError, match=words):
        OffPolicyBuffer(size, reuse)


def test_a_buffer_smaller_than_a_step_is_refused():
    """It would repeat half a step's rows, and nobody would know."""
    with pytest.raises(ValueError, match="buffer_size is 4, but a step has 8 rows"):
        writer("student", buffer=OffPolicyBuffer(4, 0.5)).rewrite(batches_of(views()), 0)
