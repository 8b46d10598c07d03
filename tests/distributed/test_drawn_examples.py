"""Samplers that measure, on two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from draw_once import KINDS, drawn, trainer_of
from launching import launch
from training import trained_weights, worst_difference

pytestmark = pytest.mark.dist


def test_two_processes_draw_what_one_does(tmp_path: Path) -> None:
    """Processes that measure their own rows only, or hear of a decision one draw apart, learn other rows; one that
    makes fewer forwards waits for ever. The same where a run goes on.
    """
    launch(Path(__file__).parent / "draw_once.py", tmp_path)
    for kind, make in KINDS.items():
        trainer = trainer_of(tmp_path / f"{kind}-alone", kind, sampler := make(), batch=4)
        trainer.train()
        theirs, rows = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        assert drawn(sampler) == rows
        assert worst_difference(trained_weights(trainer), theirs) < 1e-3
