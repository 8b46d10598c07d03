"""Texts that are written during training, by two gloo processes and by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_on_policy import WRITTEN, losses, make_trainer, trained
from training import worst_difference

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).parent / "write_once.py"


def two_processes(folder: Path, case: str) -> tuple[dict, dict]:
    """Launch the case and read the update and the numbers that process 0 wrote."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(SCRIPT), str(folder), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(folder / "update.pt", weights_only=True), json.loads((folder / "numbers.json").read_text())


@pytest.mark.parametrize("case", sorted(WRITTEN))
def test_two_processes_write_and_learn_as_one(case, tmp_path):
    """Sources, samples or counts that differ between processes make another run of it, or one that hangs."""
    trainer = make_trainer(tmp_path / "one", **WRITTEN[case]())
    update = trained(trainer)
    theirs, numbers = two_processes(tmp_path, case)
    assert worst_difference(update, theirs) < 2e-5
    assert numbers["losses"] == pytest.approx(losses(trainer), rel=2e-5)
    assert numbers["own"] == losses(trainer, "rollout/own_text")
    assert case == "scripted" or 0 < sum(numbers["own"]) < 6, "want steps of both kinds"
    assert numbers["length"] == pytest.approx(losses(trainer, "rollout/length"))


def test_each_process_keeps_its_own_texts(tmp_path):
    """A checkpoint that holds the texts of the first process alone resumes as another run."""
    _, numbers = two_processes(tmp_path, "sampled_reused")
    assert numbers["files"] == ["texts.0.safetensors", "texts.1.safetensors"]
    assert numbers["reused"] > 0 and numbers["gap"] < 1e-6
