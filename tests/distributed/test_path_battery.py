"""One battery over one process, DDP and FSDP2 on two: the number of processes and where weights lie change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import build
from launching import launch
from path_battery import CASES, STEPS, make_case, train_case, updates, worst_gap

from hfkd.cache import Hidden

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).parent / "battery_once.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the cache that the cached teachers read."""
    folder = tmp_path_factory.mktemp("battery")
    build(folder / "cache", Hidden())
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[str], dict[str, Any]]:
    """What one process makes of a case."""
    known: dict[str, dict[str, Any]] = {}

    def result(case: str) -> dict[str, Any]:
        if case not in known:
            known[case] = train_case(make_case(case, folder, processes=1))
        return known[case]

    return result


@pytest.fixture(scope="module")
def together(folder: Path) -> Callable[[str], list[dict[str, Any]]]:
    """What each of two processes makes of all cases; launched once a strategy, because imports take longer."""
    known: dict[str, list[dict[str, Any]]] = {}

    def results(strategy: str) -> list[dict[str, Any]]:
        if strategy not in known:
            known[strategy] = []  # where the launch fails, it isn't launched anew for every case
            launch(SCRIPT, folder, strategy, timeout=240)
            files = [folder / f"{strategy}-{process}.pt" for process in range(2)]
            known[strategy] = [torch.load(file, weights_only=True) for file in files]
        assert known[strategy], "the launch has failed, see the first of these tests"
        return known[strategy]

    return results


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one(alone, together, strategy: str, case: str) -> None:
    """A gradient that isn't synchronised, a count that isn't summed, or a weight that is read while it lies in shards
    makes another run of the same recipe on the next machine.
    """
    one = alone(case)
    assert len(one["losses"]) == STEPS and min(one["losses"]) > 0
    assert all(float(update.norm()) > 0 for update in updates(one).values()), "a parameter didn't move"
    for process in together(strategy):
        found = process[case]
        assert found["type"] == {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}[strategy]
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert worst_gap(one["before"], found["before"]) == 0
        assert worst_gap(one["after"], found["after"]) < 1e-5
        # The updates are a small part of the weights, so this is the sharper of the two.
        # AdamW divides small gradients by their own size, rounding included; SGD's updates are the gradients.
        assert worst_gap(updates(one), updates(found)) < (5e-4 if "adamw" in case else 5e-5)


@pytest.mark.parametrize("case", [case for case in CASES if "routed" not in case])
def test_student_and_teacher_hold_half(together, case: str) -> None:
    """A teacher that is replicated, or gathered and never freed, fills the memory that sharding was chosen for."""
    for process in together("fsdp2"):
        found = process[case]
        assert 0.45 < found["student_here"] < 0.55
        assert "cached" in case or 0.45 < found["teacher_here"] < 0.55
    for process in together("ddp"):
        assert process[case]["student_here"] == 1
