"""The recipes of recipes/which_tokens that revise by what student and teacher say, trained with a tiny model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer
from rich.console import Console

from hfkd.errors import NothingToLearn
from hfkd.recipe import load_recipe
from hfkd.recipe.source import RecipeError
from hfkd.run import run_recipe

FOLDER = Path(__file__).parent.parent / "recipes" / "which_tokens"
FIGURES = {"select": "selection/kept", "teacher_quality": "teacher/quality", "correct": "correction/corrected"}
TINY = [
    *("evaluation.size=8", "evaluation.shots=[0]", "evaluation.fidelity=false", "training.max_steps=2"),
    *("data.max_length=512", "data.teacher_max_length=2048", "training.disable_tqdm=true", "training.use_cpu=true"),
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train a recipe with changes; the steps of its log."""
    monkeypatch.chdir(tmp_path)
    make_model(seed=0).save_pretrained("tiny")
    make_tokenizer().save_pretrained("tiny")

    def trained(name: str, *changes: str) -> list[dict]:
        recipe = load_recipe(FOLDER / f"{name}.yaml", ["student.model=tiny", *TINY, *changes])
        run_recipe(recipe, console=Console(file=io.StringIO()))
        return json.loads(Path(recipe.training["output_dir"], "report.json").read_text())["loss_history"]

    return trained


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_a_recipe_trains_and_logs_what_it_decided(name, run):
    """A recipe whose reviser never reaches the trainer trains as if the line weren't there."""
    text = (FOLDER / f"{name}.yaml").read_text("utf-8")
    assert text.startswith("# ") and f"hfkd train recipes/which_tokens/{name}.yaml" in text
    shares = [entry[FIGURES[name]] for entry in run(name) if FIGURES[name] in entry]
    assert len(shares) == 2 and all(0 <= share <= 1 for share in shares)


def test_domains_reach_the_thresholds(run, tmp_path):
    """The column must come through loading, splitting and the teacher's answers up to the batch."""
    words = "walk jump sing ring bake play open close paint move start carry talk dance laugh cook wash".split()
    rows = [{"prompt": w, "completion": w, "domain": "long" if len(w) > 4 else "short"} for w in words]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [f"data.train.path={tmp_path / 'rows.jsonl'}", "data.demonstrations.count=2", "evaluation.size=4"]
    log = run("select", *own, "data.revise=[{kind: select, per: domain}]", "data.student_shots=[0]")
    assert all(any(f"selection/{name}/kept" in entry for entry in log) for name in ("long", "short"))


def test_faults_are_found_before_anything_is_loaded(run):
    """A threshold in percent would be noticed after fifty steps, a teacher that is missing after loading."""
    with pytest.raises(RecipeError, match=r"data\.revise\.0.*confidence is 90"):
        run("select", "data.revise=[{kind: select, confidence: 90}]")
    with pytest.raises(RecipeError, match=r"data\.revise\.0.*asks the teacher, and teacher\.kind is none"):
        run("teacher_quality", "teacher={kind: none}", "loss.terms=[{kind: cross_entropy}]")
    assert issubclass(NothingToLearn, ValueError), "a run that keeps nothing ends with a message, not a traceback"
