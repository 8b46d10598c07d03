"""Several adapters from one recipe on two processes, against the same on one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer
from launching import launch
from rich.console import Console
from safetensors.torch import load_file
from training import WORDS

from hfkd.recipe import load_recipe
from hfkd.run import run_recipe

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).parent / "adapters_once.py"


def test_adapters_on_two_processes(tmp_path: Path) -> None:
    """A process that takes an adapter for finished, and another one that trains it, wait for each other for ever."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": word, "completion": word + "ed", "other": word + "ing"} for word in WORDS]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": {"model": str(tmp_path / "model"), "lora": {"r": 2, "alpha": 4}},
        "teacher": {"kind": "none"},
        "data": {"train": {"path": str(tmp_path / "words.jsonl")}},
        "loss": {"terms": [{"kind": "cross_entropy"}]},
        "training": {
            "output_dir": str(tmp_path / "one"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "learning_rate": 0.1,
            "optim": "sgd",
            "disable_tqdm": True,
            "report_to": "none",
        },
        "adapters": {"first": {}, "second": {"data": {"train": {"columns": {"completion": "other"}}}}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    launch(SCRIPT, path, tmp_path / "two")
    run_recipe(load_recipe(path), console=Console(file=io.StringIO()))
    screen = (tmp_path / "two" / "screen.txt").read_text()
    assert "Adapter first (1 of 2), finished before" in screen and "Adapter second (2 of 2)\n" in screen
    for name in ("first", "second"):
        one, two = (load_file(tmp_path / count / name / "adapter_model.safetensors") for count in ("one", "two"))
        moved = [key for key in one if "lora_B" in key and float(one[key].abs().max()) > 0]
        assert moved and one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-6)
