"""Two gloo processes with a fitted early exit and targets from the head, against one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exit_once import made
from launching import launch
from training import trained_weights, worst_difference

pytestmark = pytest.mark.dist


def test_an_early_exit_on_two_processes(tmp_path):
    """Prevents processes with norms of their own, and targets that depend on which rows a process has seen."""
    launch(Path(__file__).parent / "exit_once.py", tmp_path)
    one = made(tmp_path / "one")
    before = trained_weights(one)
    one.train()
    update = {name: value - before[name] for name, value in trained_weights(one).items()}
    norm = one.teacher.state_dict()["norm.weight"]
    for process in range(2):
        found = torch.load(tmp_path / f"{process}.pt", weights_only=True)
        assert worst_difference(update, found["update"]) < 1e-4
        torch.testing.assert_close(found["norm"]["norm.weight"], norm)
