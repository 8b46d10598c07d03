"""The transform `prune`, and the weight that rises as rows are left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_model
from training import ROWS, make_trainer, trained_weights

from hfkd.objective import Objective
from hfkd.schedules import constant_or_schedule, in_words, kept_weight
from hfkd.teachers import LocalTeacher
from hfkd.transforms import Workshop
from hfkd.transforms.prune import PruneRows

NUMBERED = [
    {"prompt": f"word {place}", "completion": "x", "score": score} for place, score in enumerate([3, 1, 2, 5, 1])
]


def prune(rows: list[dict], seed: int = 0, **settings) -> list[dict]:
    """The rows that are left."""
    return PruneRows(**settings).apply(rows, Workshop(None, None, None, seed=seed))


def length(row: dict) -> float:
    """A score of one's own."""
    return len(row["prompt"])


def test_a_share_is_kept_in_the_order_of_the_data():
    """Prevents a run on other rows than the same seed gave before, and one whose smaller share holds other rows."""
    rows = [{"prompt": str(place)} for place in range(100)]
    most, few = prune(rows, keep=0.5), prune(rows, keep=0.1)
    assert (len(most), len(few)) == (50, 10)
    places = [int(row["prompt"]) for row in most]
    assert places == sorted(places) and places != list(range(50))
    assert all(row in most for row in few)
    assert prune(rows, keep=0.5) == most != prune(rows, seed=1, keep=0.5)


def test_the_highest_or_the_lowest_by_a_column_are_kept():
    """Prevents keeping the rows that were to be left out."""
    assert [row["score"] for row in prune(NUMBERED, keep=0.4, by="score")] == [3, 5]
    assert [row["score"] for row in prune(NUMBERED, keep=0.4, by="score", take="lowest")] == [1, 1]
    words = [{"prompt": "abc"}, {"prompt": "a"}, {"prompt": "ab"}]
    assert prune(words, keep=0.4, by="test_transforms_prune:length") == [words[0]]


def test_chance_decides_between_equals():
    """Prevents that of rows with one number the first ones of the file are always taken."""
    alike = [{"prompt": str(place), "score": 1.0} for place in range(50)]
    assert prune(alike, keep=0.2, by="score") != alike[:10]
    assert prune(alike, keep=0.2, by="score") != prune(alike, seed=1, keep=0.2, by="score")


def test_all_rows_are_the_same_rows_and_one_is_always_left():
    """Prevents that leaving nothing out changes the training, or that a tiny share leaves nothing to train on."""
    assert prune(NUMBERED, keep=1.0) == NUMBERED
    assert len(prune(NUMBERED, keep=0.01)) == 1


def test_what_was_done_is_told():
    """Prevents a run record that doesn't say on how many rows was trained."""
    transform = PruneRows(0.4, "score")
    transform.apply(NUMBERED, Workshop(None, None, None))
    assert transform.describe() == {"rows": 5, "kept": 2, "by": "score"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 0}, "keep is 0"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"keep": True}, "keep is True"),
        ({"keep": 0.5, "take": "best"}, "highest, lowest"),
        ({"keep": 0.5, "by": ""}, "by is ''"),
        ({"keep": 0.5, "by": "no_such_module:f"}, "by: no_such_module can't be imported"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(settings, words):
    """Prevents a fault that shows only after the models were loaded."""
    with pytest.raises(ValueError, match=words):
        PruneRows(**settings)


@pytest.mark.parametrize("found", [None, "high", float("nan")])
def test_a_row_without_a_number_is_named(found):
    """Prevents rows without a score from being kept, or left out, in silence."""
    rows = [*NUMBERED, {"prompt": "x", "score": found, "weight": 2.0}]
    with pytest.raises(ValueError, match=r"row 5 has .*Columns with a number: .*weight"):
        prune(rows, keep=0.5, by="score")


def test_the_weight_rises_as_rows_are_left_out():
    """Prevents a schedule that falls where it is to rise."""
    values = [kept_weight(kept, full=0.5, empty=1.0) for kept in (1.0, 0.5, 0.1)]
    assert values == pytest.approx([0.5, 0.75, 0.95])
    form = {"schedule": "kept", "kept": 0.3, "full": 0.5, "empty": 1.0}
    assert constant_or_schedule(form, "a weight") == pytest.approx(0.85)
    assert in_words(form) == "(0.85 for a kept share of 0.3)"
    assert Objective([{"kind": "forward_kl", "weight": form}]).describe()[0]["weight"] == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"kept": 0.3, "full": 0.5}, "kept with its three numbers"),
        ({"kept": 0, "full": 0.5, "empty": 1.0}, "above 0 and at most 1"),
        ({"kept": 0.3, "full": "half", "empty": 1.0}, "expected finite numbers"),
        ({"kept": 0.3, "full": 0.5, "empty": 1.0, "end_step": 3}, "kept with its three numbers"),
        ({"kept": 0.3, "full": 0.5, "empty": -3.0}, "none below 0"),
    ],
)
def test_a_weight_that_cannot_be_is_refused_by_the_name_of_its_term(form, words):
    """Prevents a run with a weight that nobody asked for."""
    with pytest.raises(ValueError, match=words):
        Objective([{"kind": "forward_kl", "weight": {"schedule": "kept", **form}}])


def test_kept_is_the_same_training_as_its_number(tmp_path: Path):
    """Prevents that the form of a weight changes an update; and that all rows kept train other than no transform."""
    form, ends = {"schedule": "kept", "kept": 0.5, "full": 0.5, "empty": 1.0}, []
    for weight, rows in ((0.75, ROWS[:16]), (form, prune(ROWS[:16], keep=1.0))):
        terms = [{"kind": "forward_kl", "weight": weight}]
        teacher = LocalTeacher(make_model(seed=1))
        trainer = make_trainer(tmp_path / str(len(ends)), teacher=teacher, rows=rows, objective=terms)
        trainer.train()
        ends.append(trained_weights(trainer))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
