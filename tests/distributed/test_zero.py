"""ZeRO-2 and ZeRO-3 on two processes against one. Run where DeepSpeed is installed; it's no dependency."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import build
from launching import launch
from path_battery import make_case, train_case, updates, worst_gap

from hfkd.cache import Hidden

pytestmark = [pytest.mark.dist, pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")]
SCRIPT = Path(__file__).parent / "zero_once.py"
CASES = [
    *("full local 1", "full local 4", "full cached 1", "full live 1", "full local 1 untied", "full self 1"),
    *("lora local 1", "lora self 1", "lora self 4", "full local 1 clipped"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the cache that the cached teachers read."""
    folder = tmp_path_factory.mktemp("zero")
    build(folder / "cache", Hidden())
    return folder


@pytest.fixture(scope="module")
def together(folder: Path) -> Callable[[int], list[dict[str, Any]]]:
    """What each of two processes makes of all cases; launched once a stage."""
    known: dict[int, list[dict[str, Any]]] = {}

    def results(stage: int) -> list[dict[str, Any]]:
        if stage not in known:
            launch(SCRIPT, folder, stage, *CASES, timeout=500, DS_ACCELERATOR="cpu")
            files = [folder / f"zero{stage}-{process}.pt" for process in range(2)]
            known[stage] = [torch.load(file, weights_only=True) for file in files]
        return known[stage]

    return results


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_equal_one(folder, together, stage: int, case: str) -> None:
    """A head that is read while it is empty, or whose gradient doesn't reach the shards, trains another model."""
    alone = train_case(make_case(case, folder, processes=1))
    for theirs in (one[case] for one in together(stage)):
        assert theirs["type"] == "DEEPSPEED"
        assert theirs["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert worst_gap(alone["after"], theirs["after"]) < 1e-5
        assert worst_gap(updates(alone), updates(theirs)) < 1e-4
        assert all(float(value.abs().max()) > 0 for value in updates(theirs).values())


@pytest.mark.parametrize("case", ["full local 1", "lora local 1"])
def test_each_process_holds_half_under_zero_3(together, case: str) -> None:
    """A teacher that is copied to every process fills it, whatever the stage that the student was given."""
    for theirs in (one[case] for one in together(3)):
        for model in ("student", "teacher"):
            assert theirs[model]["kind"] == "zero3" and theirs[model]["shards"] == 2
            assert theirs[model]["bytes_here"] == pytest.approx(theirs[model]["bytes_whole"] / 2, rel=1e-3)
    assert together(2)[0][case]["teacher"]["kind"] == "whole"
