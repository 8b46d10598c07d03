"""A recipe that is told to end: the exit code, what `run.json` says, and that it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import make_model, make_tokenizer
from training import WORDS
from typer.testing import CliRunner

from hfkd.cli.main import app

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "hfkd train": [sys.executable, "-c", "from hfkd.cli.main import app; app()", "train"],
    "scripts/distill.py": [sys.executable, str(ROOT / "scripts" / "distill.py")],
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A run that takes long enough to be met in mid-course."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": verb, "completion": verb + "ed"} for verb in WORDS]
    (tmp_path / "verbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "student": {"model": str(tmp_path / "model"), "lora": {"r": 2, "alpha": 4}},
        "teacher": {"kind": "self"},
        "data": {"train": {"path": str(tmp_path / "verbs.jsonl")}, "demonstrations": {"count": 2}},
        "evaluation": {"shots": [0], "size": 2, "max_new_tokens": 3},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 40,
            "save_steps": 2,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_recipe_that_is_told_to_end_says_so_and_goes_on(recipe: Path, command: str) -> None:
    """A scheduler starts a job again by its exit code; one that is called failed, or finished, is left alone."""
    out = recipe.parent / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = [*COMMANDS[command], str(recipe)]
    run = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 150
    while not (out / "checkpoint-2").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=100)
    assert run.returncode == 75, said[-3000:]
    assert "Stopped by SIGTERM after step" in said and "--resume" in said and "Traceback" not in said
    assert json.loads((out / "run.json").read_text())["status"] == "preempted"
    assert not (out / "report.json").exists() and not (out / "adapter_model.safetensors").exists()
    if command != "hfkd train":
        return  # going on doesn't depend on who started it
    again = CliRunner().invoke(app, ["train", str(recipe), "--resume"])
    assert again.exit_code == 0, again.output[-3000:]
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
