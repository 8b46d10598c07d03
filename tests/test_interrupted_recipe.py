"""A recipe that is told to end outside of its main training: what `run.json` says then, and that it goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_faults import At, kill
from test_faults_recipe import recipe  # noqa: F401
from training import trained_weights

import hfkd.run.conduct
from hfkd.errors import Preempted
from hfkd.recipe import load_recipe
from hfkd.run import run_recipe

SHORT = ["training.max_steps=4", "training.save_steps=4"]


def start(path: Path, *overrides: str) -> Any:
    return run_recipe(load_recipe(str(path), [*SHORT, *overrides]), console=Console(file=io.StringIO()))


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The trainers of the gold baseline; the first one is told to end in its third step."""
    made, original = [], hfkd.run.conduct.training_bar

    def bar(trainer: Any, console: Any, words: str) -> Any:
        if "gold" in words:
            made.append(trainer)
            if len(made) == 1:
                trainer.add_callback(At(3, kill(), begins=True))
        return original(trainer, console, words)

    monkeypatch.setattr(hfkd.run.conduct, "training_bar", bar)
    return made


def test_a_baseline_that_is_told_to_end_goes_on(recipe: Path, baselines: list[Any]) -> None:  # noqa: F811
    """Its checkpoint is what the message names: nobody would read it, and it would stay for ever."""
    with pytest.raises(Preempted, match="gold_baseline"):
        start(recipe, "evaluation.gold_baseline=true")
    out = recipe.parent / "out"
    assert json.loads((out / "run.json").read_text())["status"] == "preempted"
    result = start(recipe, "evaluation.gold_baseline=true", "training.run_policy=resume")
    assert baselines[1]._initial_global_step == 3 and baselines[1].state.global_step == 4
    assert result.report["k_shot"].keys() == {"before", "after", "gold"} and not (out / "gold_baseline").exists()
    straight = start(recipe, "evaluation.gold_baseline=true", f"training.output_dir={recipe.parent / 'straight'}")
    assert straight.record.status == "finished"
    for name, value in trained_weights(baselines[2]).items():
        assert bool((value == trained_weights(baselines[1])[name]).all())


@pytest.mark.parametrize("stage", ["before", "after"])
def test_an_evaluation_that_is_told_to_end_says_so(
    recipe: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    """A scheduler that reads "started", or nothing, doesn't start the job again; and it isn't done."""
    told = []

    def ask(self: Any, model: Any, task: Any, words: str, *more: Any) -> Any:
        if words == stage and not told:
            told.append(words)
            kill()()
        return original(self, model, task, words, *more)

    original = hfkd.run.conduct._Conductor._ask
    monkeypatch.setattr(hfkd.run.conduct._Conductor, "_ask", ask)
    with pytest.raises(Preempted, match="outside of training") as caught:
        start(recipe)
    out = recipe.parent / "out"
    assert caught.value.code == 75 and json.loads((out / "run.json").read_text())["status"] == "preempted"
    assert not (out / "report.json").exists()
    assert start(recipe, "training.run_policy=resume").record.status == "finished"
