"""Weights by how good the teacher is on a text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import make_model
from deciding import batch_of, fake_trainer, figures, log, make_trainer, trained
from test_writer import ending_in
from training import worst_difference

from hfkd import LocalTeacher
from hfkd.batch import Batch
from hfkd.revision import REVISERS, teacher_quality
from hfkd.revision.teacher_quality import TeacherQuality

BATCH = [[5, 6, 7], [8, 9]]
SAID = figures(
    [0, 0, 0, 1, 1],
    target=[5, 6, 7, 8, 9],
    teacher={"top": [5, 6, 1, 8, 9], "log_prob": np.log([0.5, 0.5, 0.25, 0.9, 0.4])},
)


@pytest.fixture
def weights(monkeypatch):
    """The weights that a reviser with these settings gives the five tokens."""
    monkeypatch.setattr(teacher_quality, "read_batch", lambda trainer, inputs: SAID)

    def given(batch=None, **settings):
        quality = TeacherQuality(**settings)
        quality.attach(fake_trainer())
        (new,) = quality.revise([batch or batch_of(BATCH)], 0)
        return Batch.from_inputs(new).token_weights, quality.figures()

    return given


def test_a_row_weighs_what_the_teacher_gets_right(weights):
    """A quality by token would drop just those tokens that the teacher has to learn from the text's other tokens."""
    found, seen = weights()
    assert found.tolist() == pytest.approx([2 / 3] * 3 + [1.0] * 2)
    assert seen == {"teacher/quality": (pytest.approx(4.0), 5.0)}
    likely, _ = weights(measure="likelihood")
    cube = (0.5 * 0.5 * 0.25) ** (1 / 3)
    assert likely.tolist() == pytest.approx([cube] * 3 + [math.sqrt(0.9 * 0.4)] * 2)


def test_one_weight_for_the_step(weights):
    """A step's quality is that of its tokens, or a short text counts as much as a long one."""
    assert weights(per="step")[0].tolist() == pytest.approx([0.8] * 5)


def test_the_floor_and_the_weights_of_the_data_set(weights):
    """Weights that replace those of the rows throw away what the user said of them."""
    given = {**batch_of(BATCH), "token_weights": torch.full((2, 5), 3.0)}
    found, seen = weights(given, floor=0.9)
    assert found.tolist() == pytest.approx([2.7] * 3 + [3.0] * 2)
    assert seen["teacher/quality"] == (pytest.approx(4.0), 5.0), "before the floor"


def test_a_text_that_a_cache_does_not_list_is_refused(weights, monkeypatch):
    """NaN as a weight ends the run at the first step, with a message about the loss."""
    said = figures([0], target=[5], teacher={"log_prob": [np.nan]})
    monkeypatch.setattr(teacher_quality, "read_batch", lambda trainer, inputs: said)
    with pytest.raises(ValueError, match="don't list every token"):
        weights(batch_of([[5]]), measure="likelihood")
    assert weights(batch_of([[5]]))[0].tolist() == [0.0]


def test_the_students_own_text_is_left_alone(tmp_path):
    """It has no gold tokens: what the teacher wouldn't have said is just what is to be learned there."""
    own = {"answer": "student", "objective": "reverse_kl"}
    plain = trained(make_trainer(tmp_path / "a", rollout=ending_in(), **own))
    trainer = make_trainer(tmp_path / "b", [TeacherQuality()], rollout=ending_in(), **own)
    update = trained(trainer)
    assert all(torch.equal(plain[name], update[name]) for name in plain) and not log(trainer, "teacher/quality")


def test_it_trains_as_the_same_weights_from_the_rows(tmp_path):
    """A floor of 1 is plain training to the last bit; any other weight is one that the rows could have had."""
    settings = {"teacher": LocalTeacher(make_model(seed=1)), "demonstrations": [], "max_steps": 1}
    plain = trained(make_trainer(tmp_path / "a", **settings))
    whole = trained(make_trainer(tmp_path / "b", [TeacherQuality(floor=1.0)], **settings))
    assert all(torch.equal(plain[name], whole[name]) for name in plain)
    trainer = make_trainer(tmp_path / "c", [TeacherQuality("likelihood", per="step")], **settings)
    scaled = trained(trainer)
    (quality,) = log(trainer, "teacher/quality")
    assert 0 < quality < 0.5
    alike = make_trainer(tmp_path / "d", token_weights=lambda row, ids: [quality] * len(ids), **settings)
    assert worst_difference(scaled, trained(alike)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"measure": "map"}, "measure is 'map'; expected 'accuracy' or 'likelihood'"),
        ({"per": "token"}, "per is 'token'; expected 'row' or 'step'"),
        ({"floor": 2}, "floor is 2; expected a number from 0 to 1"),
        ({"floor": True}, "floor is True"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    """A recipe's fault should be found when it is read."""
    with pytest.raises(ValueError, match=message):
        TeacherQuality(**settings)


def test_it_needs_a_teacher_with_its_own_prompt(tmp_path):
    """With the student's prompt the quality would be that of a teacher that nobody learns from."""
    with pytest.raises(ValueError, match="there is no teacher"):
        TeacherQuality().attach(fake_trainer(teacher=None))
    trainer = make_trainer(tmp_path)
    trainer.train_dataset.teacher_view = False
    with pytest.raises(ValueError, match="no term of the objective asks the teacher"):
        TeacherQuality().attach(trainer)
    assert REVISERS["teacher_quality"] == f"{TeacherQuality.__module__}:{TeacherQuality.__name__}"
