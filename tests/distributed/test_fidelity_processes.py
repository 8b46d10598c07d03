"""Fidelity on two processes, whole and in shards, against one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fidelity_once import CASES, measured
from launching import launch

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).parent / "fidelity_once.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes left their reports."""
    folder = tmp_path_factory.mktemp("fidelity")
    launch(SCRIPT, folder, timeout=120)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """The reports of one process."""
    return measured(folder / "alone", 1)


def close(found: Any, expected: Any) -> None:
    """The same words and counts, and numbers that differ by rounding only."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        [close(found[key], expected[key]) for key in expected]
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        [close(*pair) for pair in zip(found, expected, strict=True)]
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    else:
        assert found == expected


@pytest.mark.parametrize("case", CASES)
def test_two_processes_say_what_one_says(folder: Path, alone: dict[str, Any], case: str) -> None:
    """Texts that fill up the last batch are counted twice, each process reports its own half, or weights are read
    while they lie in shards: a figure that depends on the number of GPUs.
    """
    for process in range(2):
        found = json.loads((folder / f"{case}-{process}.json").read_text())
        for stage, report in found.items():
            assert report["texts"] == 13
            close(report, alone[stage])
    assert alone["after"]["forward_kl"] < alone["before"]["forward_kl"]


def test_what_is_wrong_with_the_rows_of_one_process_is_said_by_all(folder: Path) -> None:
    """One process gives the figures up and goes on to the training, the others wait for its share of a gather."""
    assert [(folder / f"refused-{process}.txt").read_text() for process in range(2)] == ["id 300 isn't shared"] * 2
