"""What can't work is refused before a step, and what is told is told once: teacher, terms, answers and data."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_model, make_tokenizer
from training import DEMONSTRATIONS, ROWS, make_trainer

from hfkd import HFRollout, OffPolicyBuffer, PromptStyle, TokenLoss, build_objective
from hfkd.rollout import Completion, GenerationSettings, Rollout
from hfkd.signal import TeacherSignal
from hfkd.teachers import EmaTeacher, LocalTeacher, MixtureTeacher, SelfTeacher, SnapshotTeacher, Teacher, as_teacher


class Focal(TokenLoss):
    """A loss of a user's own that learns the text, without knowing of `fits_text`."""

    def forward(self, chunk):
        log_probs = chunk.target_log_probs()
        return -((1 - log_probs.exp()) ** 2) * log_probs


class Spy(Rollout):
    """Writes the same word behind every prompt, and keeps the prompts."""

    def __init__(self) -> None:
        self.settings = GenerationSettings(max_new_tokens=4)
        self.prompts: list[list[int]] = []

    def generate(self, model, prompts, description=None):
        self.prompts += prompts
        ids = make_tokenizer()(" went")["input_ids"]
        return [Completion(ids, " went", True) for _ in prompts]


def reverse_and(*others):
    return build_objective([{"kind": "reverse_kl"}, *others])


@pytest.mark.parametrize("objective", ["forward_kl", "cross_entropy"])
def test_a_teacher_that_writes_reads_its_own_prompt(tmp_path, objective):
    """A teacher whose distribution nobody asks for loses its demonstrations, and writes as badly as the student."""
    spy = Spy()
    trainer = make_trainer(tmp_path, objective=objective, max_steps=1)
    trainer = type(trainer)(
        make_model(),
        LocalTeacher(make_model(seed=1)),
        objective,
        trainer.args,
        train_dataset=ROWS[:16],
        processing_class=make_tokenizer(),
        prompts=PromptStyle(),
        demonstrations=DEMONSTRATIONS,
        answer="teacher",
        rollout=spy,
    )
    trainer.train()
    assert all("verb0" in make_tokenizer().decode(prompt) for prompt in spy.prompts)


def test_a_text_loss_of_ones_own_is_left_out_on_own_text():
    """A user's loss on the text teaches the student what it says already, because nobody told the user of a flag."""
    assert Focal().learns_text and not build_objective("reverse_kl").terms[0].loss.learns_text
    hidden, head = torch.randn(5, 8), make_model(hidden_size=8).lm_head
    from hfkd.rows import DenseRows, Head

    rows = DenseRows(hidden, Head(head.weight.detach()))
    result = reverse_and(Focal())(rows, TeacherSignal(rows), torch.arange(5), own_text=True)
    assert set(result.parts) == {"reverse_kl"}


@pytest.mark.parametrize(
    ("teacher", "objective", "answer", "words"),
    [
        (LocalTeacher, build_objective([Focal()]), "student", "learn the text"),
        (LocalTeacher, "cross_entropy", {"student": 0.1, "dataset": 0.9}, "learn the text"),
        (None, "cross_entropy", "teacher", "no teacher"),
        (
            lambda m: MixtureTeacher({"a": LocalTeacher(m), "b": SelfTeacher("live")}),
            "forward_kl",
            "teacher",
            "no one",
        ),
        (lambda m: OnlySignal(), "forward_kl", {"teacher": 0.01, "dataset": 0.99}, "no one model"),
    ],
)
def test_text_that_teaches_nothing_or_that_nobody_writes_is_refused(tmp_path, teacher, objective, answer, words):
    """Found at the first step that draws it, it costs the hours before."""
    with pytest.raises(ValueError, match=words):
        parts(tmp_path, teacher and teacher(make_model(seed=1)), objective, answer=answer)


class OnlySignal(Teacher):
    """A teacher written against the one method."""

    def signal(self, batch, needs):
        raise AssertionError


def parts(folder, teacher, objective="forward_kl", **settings):
    """A trainer without demonstrations, so that teacher and student read the same prompt."""
    trainer = make_trainer(folder, teacher=LocalTeacher(make_model(seed=1)), demonstrations=[])
    given = {"train_dataset": ROWS[:16], "processing_class": make_tokenizer(), **settings}
    return type(trainer)(make_model(), teacher, objective, trainer.args, **given)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EmaTeacher(),
        lambda: SelfTeacher("frozen_copy"),
        lambda: MixtureTeacher({"a": EmaTeacher(), "b": SnapshotTeacher()}),
    ],
    ids=["ema", "frozen_copy", "mixture"],
)
def test_a_teacher_that_begins_as_the_student_needs_something_to_say(tmp_path, make):
    """Both stay where they are, and the loss of zero looks like success."""
    with pytest.raises(ValueError, match="begins as the student"):
        parts(tmp_path, make())
    parts(tmp_path, make(), [{"kind": "forward_kl"}, {"kind": "cross_entropy"}])
    parts(tmp_path, make(), demonstrations=DEMONSTRATIONS)


@pytest.mark.parametrize(
    "given", [{"rollout": Spy()}, {"buffer": OffPolicyBuffer(16, 0.5)}], ids=["rollout", "buffer"]
)
def test_a_rollout_that_nothing_uses_is_refused(tmp_path, given):
    """A user who passes it believes that the run is on-policy."""
    with pytest.raises(ValueError, match="no text is written"):
        parts(tmp_path, LocalTeacher(make_model(seed=1)), **given)


def test_the_default_rollout_ends_where_the_prompts_say(tmp_path):
    """In Python a student writes on into the next question, in a recipe it stops."""
    settings = {"answer": "student", "prompts": PromptStyle(stop=("\n",)), "objective": "reverse_kl"}
    assert parts(tmp_path, LocalTeacher(make_model(seed=1)), **settings).writer.rollout.settings.stop == ("\n",)


def test_a_schedule_that_leaves_own_text_without_a_lesson_is_refused(tmp_path):
    """Steps on the student's text in which only the labels count have a loss of zero, in silence."""
    stairs = {"schedule": "linear", "start": 0.0, "end": 1.0}
    objective = [{"kind": "cross_entropy"}, {"kind": "reverse_kl", "weight": stairs}]
    settings = {"objective": objective, "answer": "student", "rollout": Spy()}
    with pytest.raises(ValueError, match="nothing would be learned"):
        parts(tmp_path, LocalTeacher(make_model(seed=1)), **settings).train()


def test_an_answer_that_doesnt_fit_behind_a_prompt_is_refused(tmp_path):
    """A student with 64 positions is trained past them, or falls over at step 300."""
    rollout = HFRollout(make_tokenizer(), GenerationSettings(max_new_tokens=60))
    small = make_model(max_position_embeddings=64)
    trainer = make_trainer(tmp_path, teacher=LocalTeacher(make_model(seed=1)))
    with pytest.raises(ValueError, match="64 positions"):
        type(trainer)(
            small,
            LocalTeacher(make_model(seed=1)),
            "reverse_kl",
            trainer.args,
            train_dataset=ROWS[:16],
            processing_class=make_tokenizer(),
            answer="student",
            rollout=rollout,
        )


def test_the_end_of_an_epoch_is_told_once(tmp_path):
    """A teacher that decays by the epoch decays twice."""

    class Listener(LocalTeacher):
        told: list[float] = []

        def after_epoch(self, epoch):
            self.told.append(epoch)

    teacher = Listener(make_model(seed=1))
    make_trainer(tmp_path, teacher=teacher, max_steps=-1, num_train_epochs=3).train()
    assert teacher.told == [1.0, 2.0, 3.0]


def test_an_evaluation_is_no_training_time(tmp_path):
    """Tokens per second that depend on how often one evaluates are no measure of anything."""
    trainer = make_trainer(tmp_path, teacher=LocalTeacher(make_model(seed=1)), eval_dataset=ROWS[:4])
    trainer.model.train()
    began = trainer.meter._started
    trainer.evaluate()
    assert trainer.meter._started > began and trainer.meter._teacher_seconds == 0


def test_rows_can_be_evaluated_as_they_are(tmp_path):
    """The constructor takes rows, and `evaluate` falls over with a KeyError in the collator."""
    trainer = make_trainer(tmp_path, teacher=LocalTeacher(make_model(seed=1)))
    assert math.isfinite(trainer.evaluate(ROWS[:4])["eval_loss"])


@pytest.mark.parametrize(("given", "words"), [("ema", "EmaTeacher"), ({"a": None}, "MixtureTeacher")])
def test_short_forms_that_there_are_none_of_say_what_to_make(given, words):
    """A hub error, or one about a dict, doesn't say what to write instead."""
    with pytest.raises(ValueError, match=words):
        as_teacher(given, adapter=False)
