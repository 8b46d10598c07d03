"""`rejection`: which samples are learned, how often a model is asked, and that nothing unverified is kept."""

from __future__ import annotations

import json

import pytest
from conftest import make_model, make_tokenizer
from workshops import ScriptedRollout, scripted

from hfkd import PromptBuilder, PromptStyle
from hfkd.data.verify import VERIFIERS
from hfkd.errors import NothingToLearn, VerifierError
from hfkd.rollout.base import GenerationSettings
from hfkd.rollout.hf import HFRollout
from hfkd.teachers import EarlyExitTeacher
from hfkd.transforms import TRANSFORMS, Workshop
from hfkd.transforms.rejection import RejectionSampling

ROWS = [{"prompt": "2+2", "completion": "4"}, {"prompt": "3+3", "completion": "6", "domain": "sums"}]


def in_turn(*answers: str):
    """A script that gives these answers to each prompt, one a draw."""
    counts: dict[str, int] = {}

    def script(who: str, prompt: str, seed: int) -> str:
        counts[prompt] = counts.get(prompt, 0) + 1
        return answers[(counts[prompt] - 1) % len(answers)]

    return script


def said(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["prompt"], row["completion"]) for row in rows]


def test_only_accepted_and_different_samples_are_learned():
    """Prevents wrong answers in the training set, and one right answer that counts as often as it was drawn."""
    script = in_turn("so 4", "so  4", "5", "it is 4")
    transform = RejectionSampling("contains", samples=4)
    workshop = scripted(script)
    made = transform.apply(ROWS, workshop)
    assert said(made) == [("2+2", "so 4"), ("2+2", "it is 4"), ("3+3", "6")]
    assert made[0]["answer"] == "4" and made[2] == ROWS[1]
    assert transform.describe() == {"prompts": 2, "solved": 1, "kept": 2, "samples": 8, "accepted": 3}
    assert "3 are right, 2 of them different; 1 of 2 prompts are solved" in workshop.said[0]


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        ("always", [("2+2", "4"), ("2+2", "so 4"), ("3+3", "6")]),
        ("unsolved", [("2+2", "so 4"), ("2+2", "4"), ("3+3", "6")]),
        ("never", [("2+2", "so 4"), ("2+2", "4")]),
    ],
)
def test_what_becomes_of_the_gold_answers(gold, expected):
    """Prevents a prompt that is lost because the model can't solve it, or a gold answer that is learned twice."""
    made = RejectionSampling("contains", samples=2, gold=gold).apply(ROWS, scripted(in_turn("so 4", "4")))
    assert said(made) == expected


def test_a_solved_prompt_is_asked_no_more():
    """Prevents hours of samples that nobody keeps."""
    workshop = scripted(in_turn("4"))
    RejectionSampling("exact", samples=5, keep=1).apply(ROWS, workshop)
    asked = [text for _, text, _ in workshop.rollout.asked]
    assert sum("2+2" in text for text in asked) == 1 and sum("3+3" in text for text in asked) == 5


def test_keep_is_the_most_of_one_prompt():
    """Prevents easy prompts from flooding the training set."""
    script = in_turn("4", "it is 4", "so 4", "4, then")
    made = RejectionSampling("contains", samples=6, keep=2).apply(ROWS[:1], scripted(script))
    assert said(made) == [("2+2", "4"), ("2+2", "it is 4")]


def test_part_marks_count_as_the_threshold_says(monkeypatch):
    """Prevents a half right answer from being learned as a right one."""
    monkeypatch.setitem(VERIFIERS, "length", lambda row, text: min(1.0, len(text) / 10))
    script = in_turn("12345", "1234567")
    for threshold, count in ((0.4, 2), (0.6, 1)):
        made = RejectionSampling("length", samples=2, threshold=threshold, gold="never").apply(
            ROWS[:1], scripted(in_turn("12345", "1234567"))
        )
        assert len(made) == count
    with pytest.raises(NothingToLearn, match="none of the student's 2 answers was accepted"):
        RejectionSampling("length", samples=2, gold="never").apply(ROWS[:1], scripted(script))


def test_an_empty_answer_is_none_and_is_counted():
    """Prevents a verifier that takes nothing for right from filling the training set with nothing."""
    transform = RejectionSampling("contains", samples=1, gold="never")
    with pytest.raises(NothingToLearn, match="2 are empty"):
        transform.apply(ROWS, scripted(in_turn("  ")))
    assert transform.describe()["empty"] == 2


@pytest.mark.parametrize("writer", ["student", "teacher"])
def test_the_writer_reads_what_is_its_own(writer):
    """Prevents a student that reads the teacher's demonstrations or its secret, and a teacher that doesn't."""
    rows = [{**ROWS[0], "privileged_context": "hint: four"}]
    shown = [{"prompt": "1+1", "completion": "2"}]
    workshop = scripted(in_turn("4"), demonstrations=shown)
    RejectionSampling("exact", writer=writer, samples=1).apply(rows, workshop)
    ((who, text, _),) = workshop.rollout.asked
    assert who == writer and ("1+1" in text) == ("hint" in text) == (writer == "teacher")
    RejectionSampling("exact", samples=1, demonstrations=True).apply(rows, workshop)
    who, text, _ = workshop.rollout.asked[-1]
    assert who == "student" and "1+1" in text and "hint" not in text


def test_draws_differ_and_a_second_run_draws_the_same():
    """Prevents samples of one prompt that are all the same, and processes that hold different rows."""

    def rows(seed: int) -> tuple[list[dict], GenerationSettings]:
        tokenizer = make_tokenizer()
        rollout = HFRollout(tokenizer, GenerationSettings(max_new_tokens=4, stop=("\n",), seed=seed))
        builder = PromptBuilder(tokenizer, PromptStyle())
        workshop = Workshop(make_model(seed=0), None, builder, rollout=rollout, seed=seed)
        transform = RejectionSampling("anything", samples=4, gold="never", temperature=1.0)
        return transform.apply(ROWS, workshop), rollout.settings

    VERIFIERS["anything"] = lambda row, text: 1.0
    try:
        (first, settings), (again, _), (other, _) = rows(0), rows(0), rows(1)
    finally:
        del VERIFIERS["anything"]
    assert said(first) == said(again) != said(other)
    assert len({text for prompt, text in said(first) if prompt == "2+2"}) > 1
    assert settings.temperature == 0.0, "the run's own settings must be back"


def test_what_was_written_is_not_written_again(tmp_path):
    """Prevents a run that was killed from sampling everything anew; a file of another student must not be taken."""
    workshop = scripted(in_turn("4"), folder=tmp_path)
    first = RejectionSampling("exact", samples=2).apply(ROWS, workshop)
    asked = len(workshop.rollout.asked)
    assert asked == 4
    again = RejectionSampling("exact", samples=2).apply(ROWS, workshop)
    assert said(first) == said(again) and len(workshop.rollout.asked) == asked
    lines = (tmp_path / "rejection_student_1.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines[1:]] == ["4", "4"]
    workshop.student.weight.data.add_(1)
    with pytest.raises(ValueError, match="other conditions"):
        RejectionSampling("exact", samples=2).apply(ROWS, workshop)


@pytest.mark.parametrize(("verifier", "gold"), [("any", "unsolved"), ("any", "always"), ("exact", "never")])
def test_rows_without_an_answer_are_refused_before_anybody_writes(monkeypatch, verifier, gold):
    """Prevents that all samples are written and judged, and the run then stops at a row without a name."""
    monkeypatch.setattr("hfkd.transforms.rejection.as_verifier", lambda name: lambda row, text: 0.5)
    workshop = scripted(in_turn("so 4"))
    with pytest.raises(ValueError, match=r"rejection: row 1 \('5\+5'\) has no answer"):
        RejectionSampling(verifier, gold=gold).apply([ROWS[0], {"prompt": "5+5"}], workshop)
    assert not workshop.rollout.asked


def test_a_rows_answer_column_is_its_gold_answer(monkeypatch):
    """Prevents unlabelled rows from being refused where their answer is known, or isn't asked for."""
    rows = [{"prompt": "2+2", "answer": "4"}]
    made = RejectionSampling("exact", samples=1).apply(rows, scripted(in_turn("5")))
    assert said(made) == [("2+2", "4")]
    monkeypatch.setattr("hfkd.transforms.rejection.as_verifier", lambda name: lambda row, text: 1.0)
    made = RejectionSampling("any", samples=1, gold="never").apply([{"prompt": "2+2"}], scripted(in_turn("5")))
    assert said(made) == [("2+2", "5")]


def test_the_given_rows_stay_as_they_are():
    """Prevents a transform that changes rows which the evaluation reads, too."""
    rows = [dict(row) for row in ROWS]
    RejectionSampling("contains", samples=1).apply(rows, scripted(in_turn("so 4")))
    assert rows == ROWS


def test_conversations_get_their_last_turn_anew():
    """Prevents chat rows whose prompt is lost, or whose answer stands twice."""
    turns = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    made = RejectionSampling("contains", samples=1).apply([{"messages": turns}], scripted(in_turn("so 4"), chat=True))
    assert [message["content"] for message in made[0]["messages"]] == ["2+2", "so 4"]


def test_a_verifier_that_fails_names_the_row(monkeypatch):
    """Prevents an hour of samples that ends in a line number of somebody else's code."""
    monkeypatch.setitem(VERIFIERS, "nan", lambda row, text: float("nan"))
    with pytest.raises(VerifierError, match="nan"):
        RejectionSampling("nan").apply(ROWS, scripted(in_turn("4")))
    monkeypatch.setitem(VERIFIERS, "raises", lambda row, text: 1 / 0)
    with pytest.raises(VerifierError, match=r"2\+2"):
        RejectionSampling("raises").apply(ROWS, scripted(in_turn("4")))


def test_without_somebody_to_write_it_is_refused():
    """Prevents an attribute error in the middle of a run."""
    script = in_turn("4")
    for teacher in (None, EarlyExitTeacher(weights="live")):
        with pytest.raises(ValueError, match="lets the teacher write"):
            RejectionSampling("exact", writer="teacher").apply(ROWS, scripted(script, teacher=teacher))
    workshop = scripted(script)
    workshop.student = None
    with pytest.raises(ValueError, match="no model or no rollout"):
        RejectionSampling("exact").apply(ROWS, workshop)
    engine = ScriptedRollout(script, None)
    engine.any_model = False
    with pytest.raises(ValueError, match="backend to transformers"):
        RejectionSampling("exact").apply(ROWS, scripted(script, rollout=engine))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"writer": "nobody"}, "writer is 'nobody'"),
        ({"gold": "some"}, "gold is 'some'"),
        ({"samples": 0}, "samples is 0"),
        ({"samples": True}, "samples is True"),
        ({"keep": 0}, "keep is 0"),
        ({"threshold": 0}, "threshold is 0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": 0.0}, "all samples of a prompt would be the same"),
        ({"verifier": "right"}, "verifier is 'right'"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    """Prevents a fault that is found when the models are loaded."""
    with pytest.raises(ValueError, match=message):
        RejectionSampling(**settings)


def test_it_has_its_key():
    """Prevents a transform that no recipe can name."""
    assert TRANSFORMS["rejection"] == f"{RejectionSampling.__module__}:{RejectionSampling.__name__}"
