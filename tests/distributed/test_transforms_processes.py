"""Rows transformed by two gloo processes and by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch
from transforms_once import transformed

pytestmark = pytest.mark.dist


def test_all_processes_have_the_same_rows(tmp_path: Path):
    """Prevents two processes that train on different rows, as each one's own last digits would have it; and a process
    that waits for ever because its folder has no numbers.
    """
    launch(Path(__file__).with_name("transforms_once.py"), tmp_path, timeout=120)
    first, second, *again = (
        json.loads((tmp_path / f"rows-{process}-{turn}.json").read_text()) for turn in range(2) for process in range(2)
    )
    assert first == second == again[0] == again[1]
    assert sorted(path.name for path in tmp_path.glob("run-*")) == ["run-0"], "only the first process writes"
    alone = transformed(None)
    assert [row["prompt"] for row in first["confounders"]] == [row["prompt"] for row in alone["confounders"]]
    for one, other in zip(first["influence"], alone["influence"], strict=True):
        assert one["prompt"] == other["prompt"]
        assert one["token_weights"] == pytest.approx(other["token_weights"], abs=1e-3)
