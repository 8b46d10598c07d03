"""Batches that are revised, by two gloo processes and by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from deciding import make_trainer, trained
from launching import launch
from revise_once import CASES, figures
from training import worst_difference

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """What two processes made of all cases, in one launch."""
    folder = tmp_path_factory.mktemp("two")
    launch(Path(__file__).parent / "revise_once.py", folder)
    return folder


@pytest.mark.parametrize("case", sorted(CASES))
def test_two_processes_revise_as_one(case, theirs, tmp_path):
    """Means of one process alone keep other tokens on each, and a forward that only one makes waits for ever."""
    revisers, settings = CASES[case]()
    trainer = make_trainer(tmp_path, revisers, max_steps=3, **settings)
    update = trained(trainer)
    found = torch.load(theirs / f"{case}.pt", weights_only=True)
    numbers = json.loads((theirs / f"{case}.json").read_text())
    assert {name: pytest.approx(values, rel=1e-4) for name, values in figures(trainer).items()} == numbers
    if case == "nothing":
        assert all(not values.any() for values in [*update.values(), *found.values()])
    else:
        assert worst_difference(update, found) < 2e-5
    if case in ("sequences", "tokens"):
        assert all(0 < share < 1 for share in numbers["selection/kept"])
