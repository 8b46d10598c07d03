"""Evaluation while a recipe trains: the held-out loss and the recipe's own questions, and what is refused before a
model is loaded.
"""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_model, make_tokenizer
from rich.console import Console

from hfkd import DistillationConfig
from hfkd.recipe import RecipeError, load_recipe
from hfkd.run import run_recipe
from hfkd.run.build import build, make_config
from hfkd.run.evaluation import ask
from hfkd.run.progress import training_bar
from hfkd.run.training import make_trainer
from hfkd.trainer import DistillationTrainer

VERBS = "walk talk jump look call ask work play help turn move open wash push pull cook".split()
EACH_STEP = ("training.eval_strategy=steps", "training.eval_steps=1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, data and a recipe of a second's length."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    rows = [{"prompt": verb, "completion": verb + "ed"} for verb in VERBS]
    Path("verbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": {"model": "model", "lora": {"r": 2, "alpha": 4}},
        "teacher": {"kind": "self"},
        "data": {"train": {"path": "verbs.jsonl"}, "demonstrations": {"count": 3}},
        "evaluation": {"shots": [0, 2], "size": 5, "max_new_tokens": 3, "samples": 2},
        "training": {
            "output_dir": "out",
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "use_cpu": True,
            "learning_rate": 0.01,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def prepared(*overrides: str) -> tuple[Any, DistillationTrainer]:
    run = build(load_recipe("recipe.yaml", overrides))
    return run, make_trainer(run, run.train, run.model, run.teacher, run.objective, run.config)


def curve(trainer: DistillationTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "eval_k_shot_2" in entry]


def test_the_curve_of_a_recipe(folder: Path) -> None:
    """A curve that was asked with other settings than the report can't be read beside it."""
    run, trainer = prepared(*EACH_STEP)
    trainer.train()
    after = ask(run, trainer.model, run.evaluation, None)
    assert [entry["step"] for entry in curve(trainer)] == [1, 2]
    assert {k: curve(trainer)[-1][f"eval_k_shot_{k}"] for k in after.results} == {
        k: result.accuracy for k, result in after.results.items()
    }
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and min(losses) > 0 and len(trainer.eval_dataset) == 5
    (callback,) = [one for one in trainer.callback_handler.callbacks if type(one).__name__ == "KShotCallback"]
    assert callback.samples == 2 and callback.settings["max_new_tokens"] == 3


def test_without_a_strategy_nothing_is_evaluated(folder: Path) -> None:
    """Questions that nobody asked for cost time."""
    _, trainer = prepared()
    assert trainer.eval_dataset is None
    trainer.train()
    assert not any(name.startswith("eval_") for entry in trainer.state.log_history for name in entry)


def test_without_shots_the_loss_alone(folder: Path) -> None:
    """A recipe of passages has no questions, and still a loss on held-out texts."""
    _, trainer = prepared(*EACH_STEP, "evaluation.shots=[]")
    trainer.train()
    assert not curve(trainer) and any("eval_loss" in entry for entry in trainer.state.log_history)


def test_held_out_texts_that_do_not_fit_are_left_out(folder: Path) -> None:
    """One long item must not end a run that was to learn other texts."""
    long = {"prompt": "long " * 200, "completion": "yes"}
    items = [long, *({"prompt": f"{verb}s", "completion": verb} for verb in VERBS[:3])]
    Path("items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    _, trainer = prepared(*EACH_STEP, "evaluation.path=items.jsonl", "evaluation.split=train", "data.max_length=128")
    assert len(trainer.eval_dataset) == 3


def test_other_held_out_rows(folder: Path) -> None:
    """What is passed counts, and not the recipe's own."""
    run = build(load_recipe("recipe.yaml", EACH_STEP))
    rows = [{"prompt": "other", "completion": "one"}]
    trainer = make_trainer(run, run.train, run.model, run.teacher, run.objective, run.config, eval_rows=rows)
    assert len(trainer.eval_dataset) == 1


def test_a_whole_run_with_the_best_checkpoint_and_a_baseline(folder: Path) -> None:
    """The baseline's own trainer, which neither evaluates nor saves, must not stumble over settings that need both;
    nor be drawn into the run's curves.
    """
    best = ("load_best_model_at_end=true", "metric_for_best_model=k_shot_2", "save_strategy=steps", "save_steps=1")
    words = io.StringIO()
    more = ["evaluation.gold_baseline=true", "evaluation.fidelity=false", *(f"training.{one}" for one in best)]
    recipe = load_recipe("recipe.yaml", [*EACH_STEP, *more])
    report = run_recipe(recipe, console=Console(file=words, width=200)).report
    assert report["k_shot"].keys() == {"before", "after", "gold"}
    state = json.loads(Path("out/checkpoint-2/trainer_state.json").read_text())
    scores = [entry["eval_k_shot_2"] for entry in state["log_history"] if "eval_k_shot_2" in entry]
    assert len(scores) == 2 and report["k_shot"]["after"]["2"] == max(scores) == state["best_metric"]
    lines = [line for line in words.getvalue().splitlines() if line.startswith("Step ")]
    assert len(lines) == 2


def test_the_terminal_shows_each_evaluation(folder: Path) -> None:
    """Minutes at a bar that stands still, and a figure that only a tracker shows."""
    words = io.StringIO()
    _, trainer = prepared(*EACH_STEP)
    with training_bar(trainer, Console(file=words, width=160), "Training"):
        trainer.train()
    (first, *_) = [line for line in words.getvalue().splitlines() if line.startswith("Step 1:")]
    assert f"loss {trainer.state.log_history[1]['eval_loss']:.3f} on held-out texts, 0-shot " in first
    assert "2-shot " in first and "% ± " in first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation=null"], "training.eval_strategy: got 'steps', and there is nothing to evaluate on"),
        (["teacher.kind=local", "teacher.model=model", "teacher.cache=cache"], "a cached teacher knows no held-out"),
        (
            ["evaluation.gold_baseline=true", "training.lr_scheduler_type=reduce_lr_on_plateau"],
            "evaluation.gold_baseline: isn't evaluated while it trains",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(folder: Path, overrides: list[str], message: str) -> None:
    """Trainer would say so after the models are loaded and the first questions asked."""
    with pytest.raises(RecipeError, match=message):
        load_recipe("recipe.yaml", [*EACH_STEP, *overrides])


@pytest.mark.parametrize(("tracker", "message"), [("wandb", "pip install wandb"), ("wandbb", "'wandbb', which is no")])
def test_a_tracker_that_is_not_there_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, message: str
) -> None:
    """Trainer says so when it is made: in a recipe after the student has been asked, which may be half an hour."""
    monkeypatch.setattr("hfkd.config.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=message):
        make_config(load_recipe("recipe.yaml", [f"training.report_to={tracker}"]))
    with pytest.raises(ValueError, match=message):
        DistillationConfig("out", report_to=[tracker], use_cpu=True)


def test_trackers_that_are_there_are_not_refused(folder: Path) -> None:
    """A check that refuses too much keeps everybody from their curves."""
    here = [name for name in ("tensorboard", "trackio", "wandb") if importlib.util.find_spec(name)]
    assert DistillationConfig("out", report_to=here, use_cpu=True).report_to == here
    assert DistillationConfig("out", use_cpu=True).report_to == []
