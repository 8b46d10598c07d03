"""The single checks of the preflight on made-up data: what counts as the same question, what of a view is shared, what
a difference means, and that a wrong loss is seen.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from conftest import make_model
from rich.console import Console
from training import make_trainer

from hfkd.batch import IGNORE
from hfkd.eval.k_shot import score
from hfkd.preflight.distillable import Asked, Difference, Items, judge
from hfkd.preflight.findings import Examination, Finding, exit_code, findings_table, printable, verdict
from hfkd.preflight.leakage import find_leaks, meetings
from hfkd.preflight.lengths import spread
from hfkd.preflight.two_paths import DEFINITIONS, compare_paths
from hfkd.preflight.views import Piece, pieces_of
from hfkd.teachers import LocalTeacher, MixtureTeacher, SelfTeacher

FORM = "How many times does the letter {} appear in the text: {}"
TEXTS = [f"one{n} two{n} three{n} four{n} five{n} six{n} seven{n} eight{n}" for n in range(60)]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def test_near_duplicates() -> None:
    """Whoever compares whole texts only misses the question that was copied with another comma."""
    train = [FORM.format("a", text) for text in TEXTS]
    asked = [FORM.format("B", TEXTS[7]).upper() + "?", FORM.format("a", "nothing that was there before at all, no")]
    asked.append(FORM.format("a", TEXTS[9]).replace(":", " -", 1).replace(" -", ","))
    found = {match.row: match for match in meetings(asked, train)}
    assert found[0].other == 7 and 0.6 <= found[0].alike < 1
    assert 1 not in found, "what all questions have in common made them the same"
    assert found[2].other == 9 and found[2].alike == 1.0


def test_different_questions_stay_apart() -> None:
    """A warning for each pair of sums would be read once and never again."""
    sums = [f"What is {a} {sign} {b}?" for a in range(5) for b in range(5) for sign in "+-*"]
    assert meetings(sums[:30], sums[30:]) == []
    assert not [one for one in find_leaks(*[[{"prompt": word} for word in words] for words in (
        ["walk", "talk", "stalk"], ["walks"], ["walked"])]) if one.level != "pass"]  # fmt: skip


def test_the_nearest_of_several_is_named() -> None:
    """A pair that isn't the pair sends its reader to the wrong rows."""
    rows = [{"prompt": "a b c d e f g h i j"}, {"prompt": "a b c d e f g h i k"}, {"prompt": "x"}]
    (finding,) = find_leaks(rows, [], [{"prompt": "A b c d e f g h i j."}])
    assert finding.level == "error" and finding.figures["pairs"] == [[0, 0, 1.0]]


def test_the_pieces_of_a_view() -> None:
    """A print-out that marks the wrong tokens as learned is worse than none."""
    student = {"input_ids": [9, 5, 6, 1, 2, 3], "labels": [IGNORE] * 3 + [1, 2, IGNORE]}
    teacher = {"input_ids": [7, 7, 8, 5, 6, 1, 2, 3], "labels": [IGNORE] * 5 + [1, 2, IGNORE]}
    ours = pieces_of(student, teacher)
    behind = [Piece("both read", [5, 6]), Piece("learned", [1, 2]), Piece("not learned", [3])]
    assert ours == [Piece("this view", [9]), *behind]
    assert pieces_of(teacher, student, once=2) == [Piece("run once", [7, 7]), Piece("this view", [8]), *behind]
    assert pieces_of(teacher, student, once=4)[:2] == [Piece("run once", [7, 7, 8, 5]), Piece("both read", [6])]
    assert pieces_of(student, None)[0] == Piece("both read", [9, 5, 6])
    for view in (ours, pieces_of(teacher, student, once=4)):
        assert sum((piece.ids for piece in view), []) in (student["input_ids"], teacher["input_ids"])


def test_lengths() -> None:
    """The 95 % that stands in the table must be one that 95 % keep."""
    assert spread([5]) == {"count": 1, "min": 5, "median": 5, "p95": 5, "max": 5}
    assert spread(range(1, 101)) == {"count": 100, "min": 1, "median": 50.5, "p95": 95, "max": 100}
    assert spread([1, 2, 3])["p95"] == 3


def test_a_difference_has_the_error_of_its_pairs() -> None:
    """Two accuracies on the same items are not independent: their error by itself would hide a real difference."""
    both, one = [True] * 6 + [False] * 4, [True] * 3 + [False] * 7
    found = Difference.of(both, one)
    assert found.mean == pytest.approx(0.3) and found.error == pytest.approx((0.3 * 0.7 * 10 / 9 / 10) ** 0.5)
    assert not found.clear and Difference.of([True] * 10, [False] * 10).clear
    assert not Difference.of(both, both).clear


def asked(*answers: str) -> Asked:
    return Asked(score(0, answers, GOLDS), 1.0)


GOLDS = ["a"] * 8 + ["b", "c", "d", "e", "f", "g", "h", "i"]
ITEMS = Items([{"answer": gold} for gold in GOLDS], "held-out items", "text", 0.0, 4, judged=True)


@pytest.mark.parametrize(
    ("teacher", "student", "level", "words"),
    [
        (GOLDS, ["a"] * 4 + ["x"] * 12, "pass", "There is something to distil"),
        (["a"] * 16, ["x"] * 16, "error", "no better than always answering 'a'"),
        (["a"] * 8 + ["b"] + ["x"] * 7, ["x"] * 16, "warning", "better than the most frequent answer"),
        (["a"] * 8 + ["b"] + ["x"] * 7, GOLDS, "error", "worse than its student"),
        (["x"] * 16, ["x"] * 16, "warning", "Neither gives one right answer"),
    ],
)
def test_is_there_anything_to_distil(teacher: list[str], student: list[str], level: str, words: str) -> None:
    """A teacher that guesses is the commonest reason for a night that taught nothing."""
    (finding,) = judge(ITEMS, asked(*student), {"teacher": asked(*teacher)})
    assert finding.level == level and words in finding.message
    assert finding.figures["constant"] == 0.5 and "±" in finding.message


@pytest.mark.parametrize("right", [0, 1, 2, 31])
def test_answers_of_which_each_is_another(right: int) -> None:
    """Where each answer occurs once, one of them is right as often as a teacher that is right once: by chance."""
    golds = [f"answer {number}" for number in range(32)]
    items = Items([{"answer": gold} for gold in golds], "held-out items", "text", 0.0, 4, judged=True)
    student = Asked(score(0, ["no"] * 32, golds), 1.0)
    teacher = Asked(score(0, golds[:right] + ["no"] * (32 - right), golds), 1.0)
    (finding,) = judge(items, student, {"teacher": teacher})
    assert finding.level == ("pass" if right == 31 else "warning")


TERMS = [[{"kind": kind}] for kind in DEFINITIONS]
TERMS += [[{"kind": "forward_kl", "weight": 0.5, "temperature": 2.0}, {"kind": "cross_entropy", "weight": 0.3}]]


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "+".join(term["kind"] for term in terms))
def test_both_paths_agree(tmp_path: Path, terms: list[dict]) -> None:
    """A definition here that isn't the loss's would cry wolf at every recipe."""
    trainer = make_trainer(tmp_path, objective=terms, teacher=LocalTeacher(make_model(seed=1)))
    (finding,) = compare_paths(trainer)
    assert finding.level == "pass" and finding.figures["compared"] and finding.figures["trainer"] > 1e-3
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_several_teachers_by_hand(tmp_path: Path) -> None:
    """The mean of two teachers is a mean of probabilities, and one of them may score more ids than the student."""
    members = {"large": LocalTeacher(make_model(seed=1, vocab_size=400)), "own": SelfTeacher("frozen_copy")}
    trainer = make_trainer(tmp_path, teacher=MixtureTeacher(members, {"large": 3.0, "own": 1.0}))
    (finding,) = compare_paths(trainer)
    assert finding.level == "pass" and finding.figures["compared"] and finding.figures["trainer"] > 1e-3


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_mixed_precision_by_two_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """A plain path in float32 finds every run in bf16 wrong; one that allows for anything finds none."""
    trainer = make_trainer(tmp_path, objective=TERMS[-1], teacher=LocalTeacher(make_model(seed=1)), bf16=True)
    whole = trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda *args: whole(*args) * factor)
    (finding,) = compare_paths(trainer)
    assert finding.level == ("pass" if factor == 1.0 else "error") and "rounding of bfloat16" in finding.message
    assert finding.figures["precision"] == "bfloat16" and finding.figures["tolerance"] > 1e-4


@pytest.mark.parametrize("fault", ["loss", "gradient", "prefix"])
def test_a_wrong_path_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Two paths that share their fault, or a tolerance that swallows it, are no check."""
    trainer = make_trainer(tmp_path)
    whole = trainer.compute_loss
    if fault == "prefix":
        ids = trainer.teacher.prefix.ids
        ids[:] = ids[:-1] + [ids[0]]
        monkeypatch.setattr(type(trainer.teacher.prefix), "rest_of", _rest_without_a_look)
    else:
        scale = 1.01 if fault == "loss" else None

        def wrong(*args, **kwargs):
            loss = whole(*args, **kwargs)
            return loss * scale if scale else loss + 0.01 * (loss - loss.detach())

        monkeypatch.setattr(trainer, "compute_loss", wrong)
    (finding,) = compare_paths(trainer)
    assert finding.level == "error" and "isn't what the recipe says" in finding.message


def _rest_without_a_look(prefix, view):
    size = len(prefix.ids)
    return type(view)(view.input_ids[:, size:], view.attention_mask[:, size:], view.labels[:, size:])


def test_what_can_not_be_compared_is_said(tmp_path: Path) -> None:
    """A check that is silent where it can't look seems to have looked."""
    (finding,) = compare_paths(make_trainer(tmp_path, objective=[{"kind": "adaptive_kl"}]))
    assert finding.level == "pass" and "no definition" in finding.message and not finding.figures["compared"]


def test_a_check_that_raises_hides_no_other() -> None:
    """One fault at a time means as many starts as faults."""
    exam = Examination(quiet())

    def failing():
        logging.getLogger("hfkd.anything").warning("it is late")
        yield Finding("pass", "first", "so far")
        raise RuntimeError("broken: token=hf_abcdefghijkl")

    assert not exam.check("first", failing)
    assert exam.make("second", lambda: 1 / 0) is None
    assert exam.check("third", lambda: [Finding("pass", "third", "fine")], needed=1)
    assert not exam.check("fourth", lambda: [], needed=None)
    found = exam.close()
    assert [(one.name, one.level) for one in found] == [
        ("first", "pass"), ("first", "error"), ("first", "warning"), ("second", "error"), ("third", "pass"),
        ("not run", "warning"),
    ]  # fmt: skip
    assert found[1].message.startswith("RuntimeError: broken") and "ZeroDivisionError" in found[3].message
    assert verdict(found) == "2 errors, 2 warnings" and verdict(found[:1]) == "passed"
    assert (exit_code(found), exit_code(found[2:3]), exit_code(found[2:3], strict=True)) == (1, 0, 1)
    assert "hf_abcdefghijkl" not in exam.console.file.getvalue()


def test_what_is_printed_can_not_steer_a_terminal() -> None:
    """A row of data that wipes the error line above it is an attack."""
    assert printable("a\x1b[2Jb\nc") == "a\\x1b[2Jb\nc"
    narrow = Console(file=io.StringIO(), width=40)
    narrow.print(findings_table([Finding("error", "x", "[red]not markup[/red] " * 5)]))
    assert "[red]not" in narrow.file.getvalue()
