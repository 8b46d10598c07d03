"""Two gloo processes against one: the promise that the number of processes changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from test_trainer import Jeffreys
from test_trainer_terms import STATES, narrow_teacher
from training import make_trainer, run, trained_weights, worst_difference

from hfkd import LocalTeacher, Objective
from hfkd.terms import Term

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).parent / "train_once.py"


def two_processes(folder: Path, case: str) -> tuple[dict, dict]:
    """Launch the case and read the update and the numbers that process 0 wrote."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(SCRIPT), str(folder), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(folder / "update.pt", weights_only=True), json.loads((folder / "numbers.json").read_text())


@pytest.mark.parametrize("case", ["plain", "accumulated"])
def test_two_processes_equal_one(tmp_path, case):
    """Peers' losses and gradients halve with two processes, so every learning rate is wrong on the next machine."""
    update, losses = run(tmp_path / "one")
    theirs, numbers = two_processes(tmp_path, case)
    assert worst_difference(update, theirs) < 1e-5
    assert numbers["losses"] == pytest.approx(losses, rel=1e-5)


def test_full_student_and_local_teacher(tmp_path):
    """A full model's gradients must be averaged too: a forward past the wrapper leaves each process with its own."""
    teacher = LocalTeacher(make_model(seed=1))
    trainer = make_trainer(tmp_path / "one", teacher=teacher, demonstrations=[], learning_rate=0.3)
    trainer.train()
    evaluated = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    update, losses = run(tmp_path / "again", teacher=teacher, demonstrations=[], learning_rate=0.3)
    theirs, numbers = two_processes(tmp_path, "full")
    assert worst_difference(update, theirs) < 1e-5
    assert numbers["losses"] == pytest.approx(losses, rel=1e-5)
    assert numbers["eval_loss"] == pytest.approx(evaluated, rel=1e-5)


def test_a_loss_with_a_parameter_of_its_own(tmp_path):
    """Parameters of losses are outside the wrapper: without an average of their own the processes drift apart."""
    one = make_trainer(tmp_path / "one", objective=Objective([Term("jeffreys", Jeffreys())]))
    one.train()
    _, numbers = two_processes(tmp_path, "own_parameter")
    assert numbers["factor"][0] != 1.0
    assert numbers["factor"] == pytest.approx([one.objective.losses[0].factor.item()], rel=1e-5)


def test_states_with_projections_and_a_loss_that_is_a_network(tmp_path):
    """Projections and networks of losses must begin alike on all processes and stay alike."""
    torch.manual_seed(0)
    objective = Objective([*STATES, {"kind": "clipped_kl", "support": 32}])
    one = make_trainer(
        tmp_path / "one", teacher=narrow_teacher(), demonstrations=[], learning_rate=0.3, objective=objective
    )
    before = trained_weights(one)
    one.train()
    update = {name: value - before[name] for name, value in trained_weights(one).items()}
    theirs, numbers = two_processes(tmp_path, "states")
    assert worst_difference(update, theirs) < 3e-5
    expected = [float(value.detach().sum()) for value in one.objective.parameters()]
    assert numbers["factor"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_fully_masked_process_takes_part(tmp_path):
    """A process without a supervised token must give 0 and join backward; otherwise the others wait for it for
    ever.
    """
    _, numbers = two_processes(tmp_path, "masked_rank")
    assert all(loss > 0 for loss in numbers["losses"])
