"""A rewarded training by two gloo processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).parent / "reward_once.py"


def both(folder: Path, case: str) -> tuple[dict, dict]:
    launch(SCRIPT, folder, case)
    return tuple(json.loads((folder / f"process-{place}.json").read_text()) for place in range(2))


def test_two_processes_take_one_mean(tmp_path):
    """A mean over each process's own taught tokens would weigh a token by where it was drawn."""
    first, second = both(tmp_path, "whole")
    assert first["weights"] == second["weights"]
    assert first["share"] == pytest.approx([1 - reward for reward in first["reward"]])
    assert first["loss"] == pytest.approx([0.5 * term for term in first["term"]], rel=1e-4)
    assert all(term > 0.1 for term in first["term"])


def test_a_verifier_that_breaks_on_one_process_stops_both(tmp_path):
    """The other one would wait for its rewards for ever."""
    first, second = both(tmp_path, "broken")
    assert first["error"] == second["error"] and "raised KeyError" in first["error"]
