"""What the tests of `hfkd evaluate` share: a working folder with a short recipe, and short ways to call."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import make_model, make_tokenizer
from rich.console import Console
from typer.testing import CliRunner

import hfkd.run.evaluation
from hfkd.cli.main import app
from hfkd.recipe import load_recipe
from hfkd.run import run_recipe
from hfkd.run.evaluation import evaluate_recipe

VERBS = "walk talk jump look call ask work play help turn move live".split()


def make_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, data and a recipe of a second's length."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    Path("verbs.jsonl").write_text(
        "".join(json.dumps({"prompt": verb, "completion": verb + "ed"}) + "\n" for verb in VERBS)
    )
    Path("other.jsonl").write_text("".join(json.dumps({"prompt": v + "s", "completion": v}) + "\n" for v in VERBS))
    recipe = {
        "student": {"model": "model", "lora": {"r": 2, "alpha": 4}},
        "teacher": {"kind": "self"},
        "data": {"train": {"path": "verbs.jsonl"}, "demonstrations": {"count": 2}, "student_shots": [0]},
        "evaluation": {"shots": [0], "size": 4, "max_new_tokens": 3},
        "training": {
            **{"output_dir": "out", "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1},
            **{"use_cpu": True, "learning_rate": 0.05, "disable_tqdm": True, "report_to": "none"},
        },
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def train(*overrides: str) -> dict:
    return run_recipe(load_recipe("recipe.yaml", overrides), console=quiet()).report


def evaluate(*overrides: str, recipe: str = "recipe.yaml", **options) -> dict:
    console = options.pop("console", None) or quiet()
    return evaluate_recipe(load_recipe(recipe, overrides), console=console, **options)["results"]


def call(*arguments: object) -> SimpleNamespace:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


def note_asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that were really asked, in order."""
    seen, ask = [], hfkd.run.evaluation.ask

    def noted(run, model, task, description):
        seen.append(task.name)
        return ask(run, model, task, description)

    monkeypatch.setattr(hfkd.run.evaluation, "ask", noted)
    return seen
