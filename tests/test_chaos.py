"""The script that kills a training finds nothing wrong with it, and would say so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "chaos.py"


def test_a_training_that_is_killed_three_times_is_the_same_training(tmp_path: Path) -> None:
    """Damage: a machine that is taken away costs more than the steps since the last checkpoint, or changes the
    weights.
    """
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--steps", "8", "--save-steps", "2"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "8 steps, 3 kills" in done.stdout and "to the last bit" in done.stdout
    assert sum("│ checkpoint-" in line or "the beginning" in line for line in done.stdout.splitlines()) == 3


def test_what_went_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage: a script that prints "the same" whatever it compared."""
    import torch
    from safetensors.torch import save_file

    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from chaos import Kill, differences, finish, moments

    for name, value in (("alone", 1.0), ("disturbed", 1.0 + 2**-23)):
        (tmp_path / name / "final").mkdir(parents=True)
        weights = {"same": torch.ones(2), "other": torch.tensor(value)}
        save_file(weights, tmp_path / name / "final" / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match="The undisturbed run failed with exit code 1"):
        finish(lambda: 1 / 0, "The undisturbed run")
    assert differences(tmp_path / "alone", tmp_path / "disturbed") == ["other"]
    assert Kill(step=14, saving=True, resumed_from=10).lost == 4
    drawn = moments([0.0, 1.0, 5.0], 50, seed=1)
    assert drawn == sorted(drawn) and {step for step, _ in drawn} == {0, 1}
    assert sum(step == 1 for step, _ in drawn) > 30, "a step that takes longer is hit more often"
