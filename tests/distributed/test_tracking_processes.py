"""Questions at each evaluation on two gloo processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import launch
from test_tracking import EVALUATED, asking, logged
from training import make_trainer, trained_weights

pytestmark = pytest.mark.dist


def test_two_processes_have_the_curve_of_one(tmp_path):
    """Where one process alone asks, the others wait for it for ever; where each believes its own figures, they may
    choose different checkpoints; where each sends samples, a tracker has them twice.
    """
    one = make_trainer(tmp_path / "one", **EVALUATED, callbacks=[asking()])
    one.train()
    launch(Path(__file__).parent / "track_once.py", tmp_path, timeout=120)
    first, second = (json.loads((tmp_path / f"seen-{place}.json").read_text()) for place in (0, 1))
    assert first["curve"] == second["curve"]
    wanted = [pytest.approx(entry) for entry in logged(one)]
    assert first["curve"] == wanted and [entry["step"] for entry in first["curve"]] == [1, 2]
    assert [step for _, _, step in first["samples"]] == [1, 2] and second["samples"] == []
    weights = [torch.load(tmp_path / f"weights-{place}.pt", weights_only=True) for place in (0, 1)]
    for name, value in trained_weights(one).items():
        assert torch.equal(weights[0][name], weights[1][name])
        torch.testing.assert_close(weights[0][name], value, rtol=1e-4, atol=1e-5)
