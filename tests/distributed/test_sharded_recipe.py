"""A whole recipe in shards, from loading to the card, against the same recipe on one process."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer
from launching import SHARDED_ENVIRONMENT, launch
from rich.console import Console
from training import WORDS
from transformers import AutoModelForCausalLM

from hfkd.recipe import load_recipe
from hfkd.run import run_recipe

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).parent / "recipe_once.py"


def test_a_whole_recipe_in_shards(tmp_path: Path) -> None:
    """Loading, the teacher's answers, evaluations, training, the baseline on gold labels and saving each meet the
    models in another state.
    """
    for name, seed in (("student", 0), ("teacher", 1)):
        make_model(seed=seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"prompt": word, "completion": word + "ed"} for word in WORDS]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": {"model": str(tmp_path / "student")},
        "teacher": {"kind": "local", "model": str(tmp_path / "teacher")},
        "data": {
            "train": {"path": str(tmp_path / "words.jsonl")},
            "demonstrations": {"count": 2},
            "answer": "teacher",
            "generation": {"max_new_tokens": 4},
        },
        "evaluation": {"shots": [0, 2], "size": 4, "max_new_tokens": 3, "gold_baseline": True},
        "training": {
            "output_dir": str(tmp_path / "one"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "use_cpu": True,
            "learning_rate": 0.1,
            "optim": "sgd",
            "disable_tqdm": True,
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    changed = [f"training.output_dir={tmp_path / 'two'}", "training.per_device_train_batch_size=2"]
    launch(SCRIPT, tmp_path / "recipe.yaml", *changed, "training.ddp_backend=gloo", **SHARDED_ENVIRONMENT)
    one = run_recipe(load_recipe(tmp_path / "recipe.yaml", []), console=Console(file=io.StringIO())).report
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    assert one["k_shot"].keys() == two["k_shot"].keys() == {"before", "teacher", "after", "gold"}
    assert two["k_shot_details"] == one["k_shot_details"]
    for ours, theirs in zip(one["loss_history"], two["loss_history"], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    for process in range(2):
        distilled, gold = torch.load(tmp_path / f"shares-{process}.pt", weights_only=True)
        assert max(distilled["teacher"], distilled["student"], gold["student"]) < 0.55
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights[0]["model.norm.weight"], make_model(seed=0).model.norm.weight.detach())
    assert {"run.json", "report.json", "README.md"} <= {path.name for path in (tmp_path / "two").iterdir()}
