"""Runs of two processes that go on from a checkpoint, and runs that go on with another number of processes."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from launching import launch
from resume_once import SETTINGS
from training import make_trainer, trained_weights, worst_difference

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).parent / "resume_once.py"


def test_each_process_goes_on_with_its_own(tmp_path: Path) -> None:
    """A process that takes the first one's random numbers or texts, or another checkpoint than the others do, is in
    another run than they are.
    """
    launch(SCRIPT, tmp_path, "same_twice")
    names = {path.name for path in (tmp_path / "straight" / "checkpoint-6").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "texts.0.safetensors", "texts.1.safetensors"} <= names


def test_machines_with_disks_of_their_own(tmp_path: Path) -> None:
    """Half a checkpoint on each of two disks looks, on each of them, like a whole one."""
    launch(SCRIPT, tmp_path, "disks")


def test_another_number_of_processes_learns_the_same_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A node that is lost must not end the run, as long as a step has the same rows."""
    folders = [tmp_path / name for name in ("one", "two", "back")]
    one = make_trainer(folders[0], **SETTINGS)
    one.train()
    shutil.copytree(folders[0] / "checkpoint-2", folders[1] / "checkpoint-2")
    launch(SCRIPT, folders[1], "go_on")
    straight = trained_weights(one)
    assert worst_difference(straight, torch.load(folders[1] / "weights.pt", weights_only=True)) < 1e-4
    shutil.copytree(folders[1] / "checkpoint-4", folders[2] / "checkpoint-4")
    back = make_trainer(folders[2], **SETTINGS)
    with caplog.at_level(logging.WARNING):
        back.train(resume_from_checkpoint=True)
    assert any("as 2 processes x batch 4 x accumulation 1" in record.message for record in caplog.records)
    assert worst_difference(straight, trained_weights(back)) < 1e-4
