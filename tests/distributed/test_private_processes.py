"""Private tokens of two gloo processes and of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import launch
from private_once import learned, secretive
from training import worst_difference

from hfkd.revision.private import ALL_MARKED_STEPS

pytestmark = pytest.mark.dist


def test_two_processes_hide_what_one_hides(tmp_path):
    """Prevents a process that stops alone over its own texts (the other waits for ever), and a share of half of the
    texts.
    """
    trainer = secretive(tmp_path / "one")
    update = learned(trainer)
    shares = [line["private/share"] for line in trainer.state.log_history if "private/share" in line]
    launch(Path(__file__).parent / "private_once.py", tmp_path)
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert worst_difference(update, torch.load(tmp_path / "update.pt", weights_only=True)) < 2e-5
    assert numbers["shares"] == pytest.approx(shares) and all(0 < share < 1 for share in shares)
    assert (numbers["one"], numbers["all"]) == (0, ALL_MARKED_STEPS)
