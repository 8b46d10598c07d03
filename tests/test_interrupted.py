"""Interruptions whose moment or cause is unusual: in an evaluation, in the last step, in what the losses learn."""

from __future__ import annotations

import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from test_faults import At, kill
from test_resume import Leaning
from training import ROWS, make_trainer, trained_weights
from transformers import TrainerCallback

from hfkd import DistillationTrainer
from hfkd.errors import CheckpointNotSaved, NonFiniteGradient, NonFiniteLoss, Preempted
from hfkd.objective import Objective, Term
from hfkd.record import checkpoints, clear_output_folder

EACH_STEP = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}


def test_a_nan_in_what_a_loss_learns_stops_before_it_is_learned(tmp_path: Path) -> None:
    """The loss of the next step would be the first sign, and the checkpoint before it holds the NaN already."""
    loss = Leaning()
    trainer = make_trainer(tmp_path, objective=Objective([Term("leaning", loss)]), max_steps=5, **EACH_STEP)
    loss.factor.register_hook(lambda gradient: gradient * (math.nan if trainer.state.global_step == 2 else 1))
    with pytest.raises(NonFiniteGradient, match=r"step 3 .*objective\.\S*factor") as caught:
        trainer.train()
    assert bool(torch.isfinite(loss.factor)) and str(tmp_path / "checkpoint-2") in str(caught.value)


def test_a_checkpoint_of_a_broken_loss_is_not_called_good(tmp_path: Path) -> None:
    """The student's weights are finite all the time."""
    loss = Leaning()
    trainer = make_trainer(tmp_path, objective=Objective([Term("leaning", loss)]), max_steps=5, **EACH_STEP)
    trainer.add_callback(At(2, lambda: loss.factor.data.fill_(math.nan)))
    with pytest.raises(NonFiniteLoss, match="step 3") as caught:
        trainer.train()
    assert "checkpoint-2" not in str(caught.value) and str(tmp_path / "checkpoint-1") in str(caught.value)


PLATEAU = {
    "eval_dataset": ROWS[:4],
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"factor": 0.5, "patience": 0, "mode": "max"},  # the loss falls, so each one is a plateau
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # the first evaluation stays the best
    "load_best_model_at_end": True,
    "save_strategy": "steps",
    "save_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "optim": "adamw_torch",
}


def evaluations(trainer: DistillationTrainer) -> list[tuple[int, float]]:
    return [(one["step"], one["eval_loss"]) for one in trainer.state.log_history if "eval_loss" in one]


def assert_same_course(straight: DistillationTrainer, resumed: DistillationTrainer) -> None:
    """The evaluations, the best checkpoint and the weights."""
    assert evaluations(resumed) == evaluations(straight) and len(evaluations(straight)) > 1
    assert resumed.state.best_global_step == straight.state.best_global_step == 4
    assert Path(resumed.state.best_model_checkpoint).name == "checkpoint-4"
    for name, value in trained_weights(straight).items():
        assert torch.equal(value, trained_weights(resumed)[name])


@pytest.mark.parametrize("step", [4, 8])
def test_an_evaluation_that_a_signal_left_out_is_done_first_on_resume(tmp_path: Path, step: int) -> None:
    """The learning rate, which checkpoint is the best and when to stop early may all follow from it."""
    steps = {**PLATEAU, "eval_strategy": "steps", "eval_steps": 4, "max_steps": 8}
    straight = make_trainer(tmp_path / "straight", **steps)
    straight.train()
    with pytest.raises(Preempted):
        make_trainer(tmp_path / "run", **steps, callbacks=[At(step, kill(), begins=True)]).train()
    resumed = make_trainer(tmp_path / "run", **steps)
    resumed.train(resume_from_checkpoint=True)
    assert_same_course(straight, resumed)


def test_an_evaluation_at_the_end_of_an_epoch_is_not_lost_between_two_runs(tmp_path: Path) -> None:
    """The checkpoint of the epoch's last step is written before it."""
    epochs = {**PLATEAU, "eval_strategy": "epoch", "max_steps": 8, "load_best_model_at_end": False}
    straight = make_trainer(tmp_path / "straight", **epochs)
    straight.train()
    shutil.copytree(tmp_path / "straight" / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    resumed = make_trainer(tmp_path / "run", **epochs)
    resumed.train(resume_from_checkpoint=True)
    assert_same_course(straight, resumed)


class OnEvaluation(TrainerCallback):
    """Sends this process a signal in the evaluation after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [2, 4])
def test_a_signal_in_an_evaluation_ends_after_it_with_a_checkpoint(tmp_path: Path, caplog: Any, step: int) -> None:
    """Not a step later; and in the last evaluation not without a checkpoint."""
    trainer = make_trainer(
        tmp_path,
        max_steps=4,
        eval_dataset=ROWS[:4],
        eval_strategy="steps",
        eval_steps=2,
        callbacks=[OnEvaluation(step)],
    )
    with pytest.raises(Preempted):
        trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}"]
    assert any("Got SIGTERM" in record.getMessage() for record in caplog.records)


def test_overwriting_removes_private_batches_and_the_baseline(tmp_path: Path) -> None:
    """The rows of a step that failed are in its batches: what starts anew mustn't keep, or push, them."""
    for name in ("_nonfinite-step-3/process-0", "gold_baseline/checkpoint-3", "checkpoint-2", "mine"):
        (tmp_path / name).mkdir(parents=True)
    clear_output_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_room_on_the_disk_is_asked_for_where_it_is_missing_only(tmp_path: Path, monkeypatch: Any) -> None:
    """Whoever reads "make room" looks at the disk, and not at the callback that has a bug."""

    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("hfkd.long_runs.save_companions", fail)
    with pytest.raises(CheckpointNotSaved, match="TypeError: a bug") as caught:
        make_trainer(tmp_path, **EACH_STEP).train()
    assert "Make room" not in str(caught.value)


def test_a_loss_changed_after_the_objective_is_not_called_finite(tmp_path: Path, monkeypatch: Any) -> None:
    """An overridden `compute_loss` may return what the objective never saw."""

    class Doubled(DistillationTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * math.inf

    monkeypatch.setattr(training, "DistillationTrainer", Doubled)
    with pytest.raises(NonFiniteGradient, match="step 1") as caught:
        make_trainer(tmp_path).train()
    assert "though its loss is" not in str(caught.value) and "the objective's value" in str(caught.value)


def test_evaluation_needs_no_folder_to_write_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is saved; what is refused is training with checkpoints."""

    def refused(folder: Any) -> None:
        raise PermissionError("can't be written into")

    monkeypatch.setattr("hfkd.long_runs.check_writable", refused)
    assert make_trainer(tmp_path, save_strategy="no").evaluate(ROWS[:4])["eval_loss"] > 0
    with pytest.raises(OSError, match="can't be written into"):
        make_trainer(tmp_path, save_strategy="epoch")
