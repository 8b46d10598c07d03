"""Two gloo processes whose rows name different teachers, against one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_several_teachers import routed_with_a_moving_member
from training import trained_weights, worst_difference

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).parent / "train_routed.py"


def test_routed_rows_on_two_processes(tmp_path):
    """Prevents a process that waits for a teacher which has no rows there, and members that drift apart."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one = routed_with_a_moving_member(tmp_path / "one")
    before = trained_weights(one)
    one.train()
    update = {name: value - before[name] for name, value in trained_weights(one).items()}
    for process in range(2):
        found = torch.load(tmp_path / f"{process}.pt", weights_only=True)
        assert worst_difference(update, found["update"]) < 1e-4
        states = one.teacher.state_dict()
        assert found["teacher"].keys() == states.keys() and len(states) > 5
        for name, value in states.items():
            torch.testing.assert_close(found["teacher"][name], value, rtol=1e-4, atol=1e-5)
