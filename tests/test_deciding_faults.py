"""Parts of a recipe that don't go together are told with the recipe, and what only looks like code is not imported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import make_model

from hfkd.recipe import RecipeError, load_recipe
from hfkd.run.against_teacher import deciding_of

INFLUENCE = "data.transforms=[{kind: influence}]"
CONFOUNDERS = "data.transforms=[{kind: confounders}]"
KEPT = "loss.terms=[{kind: forward_kl, weight: {schedule: kept, kept: %s, full: 0.5, empty: 1.0}}]"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"prompt": "verb", "completion": "verbed"}) + "\n")
    recipe = {
        "student": {"model": "model", "lora": {"r": 2, "alpha": 4}},
        "teacher": {"kind": "self"},
        "data": {"train": {"path": "rows.jsonl"}, "demonstrations": {"count": 4}},
        "evaluation": {"shots": [0], "size": 4},
        "training": {"output_dir": "out", "max_steps": 2},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.transforms=[{kind: prune, keep: 0.3}]", KEPT % 0.5], "loss.terms.0.weight.kept: got 0.5, and prune"),
        ([INFLUENCE, "data.token_weights='json:dumps'"], "data.token_weights: is a function"),
        (["data.transforms=[{kind: prune, keep: 0.3}]", "teacher.cache=said"], "train without teacher.cache"),
        (["loss.terms=[{kind: swing}]"], "data.revise is empty"),
        ([INFLUENCE, "evaluation=null"], "data.transforms.0: influence holds rows against clean ones"),
        ([CONFOUNDERS], "data.transforms.0: confounders holds the student against one other model"),
        ([CONFOUNDERS, "teacher.kind=ema"], "teacher.kind is ema; set it to local"),
        ([CONFOUNDERS, "teacher={kind: cross_tokenizer, model: model}"], "teacher.kind is cross_tokenizer; set it"),
    ],
)
def test_parts_that_do_not_go_together(folder: Path, overrides: list[str], said: str) -> None:
    """Each of these would be found after the evaluation, or never: a weight that nobody reads changes no figure."""
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml", overrides)
    assert said in str(caught.value)


def test_parts_that_go_together(folder: Path) -> None:
    """A fault in what would have run is worse than one that is found late."""
    load_recipe("recipe.yaml", ["data.transforms=[{kind: prune, keep: 0.5}]", KEPT % 0.5])
    load_recipe("recipe.yaml", [INFLUENCE, "data.token_weights=weight"])
    load_recipe("recipe.yaml", ["data.transforms=[{kind: influence, path: rows.jsonl}]", "evaluation=null"])
    for teacher in ("{kind: local, model: model}", "{kind: 'test_deciding:Backwards'}"):
        load_recipe("recipe.yaml", [CONFOUNDERS, f"teacher={teacher}"])


@pytest.mark.parametrize(
    "transform",
    [
        "{kind: influence, path: 'reasoning_gym:chain_sum'}",
        "{kind: confounders, spare: '(?:\\d)'}",
        "{kind: confounders, spare: 'Answer:Yes'}",
    ],
)
def test_what_only_looks_like_code_is_not_imported(folder: Path, transform: str) -> None:
    """`hfkd evaluate --fidelity` would end with a column, a task or a regular expression that can't be imported; what
    chose training rows says nothing of held-out ones.
    """
    make_model().save_pretrained("model")
    recipe = load_recipe("recipe.yaml", ["teacher={kind: local, model: model}", f"data.transforms=[{transform}]"])
    assert deciding_of(recipe)["code"] == {}
