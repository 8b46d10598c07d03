"""The ablation: its recipes differ in the objective alone, and its script keeps held-out text out of training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import make_tokenizer

from hfkd.data.passages import WORDS, opening
from hfkd.recipe import load_recipe
from hfkd.run.build import build

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes" / "ablation").glob("*.yaml"))


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    import ablation

    return ablation


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_only_the_objective_differs(path: Path) -> None:
    """A recipe with another learning rate or other data would win for a reason that the table doesn't name."""
    recipe, base = load_recipe(path).resolved(), load_recipe(path.with_name("forward_kl.yaml")).resolved()
    for tree in (recipe, base):
        tree.pop("loss")
        assert tree["training"].pop("output_dir").startswith("outputs/ablation/")
    if path.stem == "cross_entropy":
        assert recipe.pop("teacher")["kind"] == "none" and base.pop("teacher")["kind"] == "local"
    assert recipe == base
    build(load_recipe(path), dry=True)


def test_passages_are_those_of_the_file_and_not_their_shuffles(ablation, tmp_path: Path) -> None:
    """Ten shuffles of each passage stand beside it: split at random, nearly all held-out text would be trained on."""
    path = tmp_path / "passages.jsonl"
    rows = [{"0": "A b. C d.", "1": "C d. A b."}, {"0": "A b. C d."}, {"text": "E f."}, {"text": "one"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ablation.read_passages(path) == ["A b. C d.", "E f."]
    path.write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match="line 1: expected a JSON object with the column text"):
        ablation.read_passages(path)


def test_held_out_is_held_out(ablation, tmp_path: Path) -> None:
    """A passage in both files makes every student look nearer than it is."""
    passages = [f"{number} " + "walk " * (100 if number % 2 else 3) for number in range(200)]
    train, held_out = ablation.split_passages(passages, make_tokenizer(), tmp_path)
    texts = [{json.loads(line)["text"] for line in path.read_text().splitlines()} for path in (train, held_out)]
    assert len(texts[1]) == ablation.HELD_OUT_PASSAGES and texts[0].isdisjoint(texts[1])
    assert texts[0] | texts[1] == set(passages)
    again = ablation.split_passages(passages, make_tokenizer(), tmp_path / "again")[1]
    assert again.read_text() == held_out.read_text()
    with pytest.raises(ValueError, match="got 3 passages"):
        ablation.split_passages(passages[:3], make_tokenizer(), tmp_path)


def test_summary(ablation) -> None:
    """A mean over the wrong runs is a result of nobody."""
    figures = dict.fromkeys(ablation.COLUMNS, 1.0)
    runs = [{"objective": "a", **figures, "forward_kl": value} for value in (1.0, 3.0)] + [
        {"objective": "b", **figures}
    ]
    summary = ablation.summarize(runs)
    assert summary["a"]["forward_kl"] == {"mean": 2.0, "spread": 1.0, "values": [1.0, 3.0]}
    assert summary["b"]["perplexity"]["spread"] == 0


def test_openings() -> None:
    """A row that is cut within a word, or whose parts don't add up to the text, trains on something else."""
    row = opening({"text": "  The first\n\nwords " + "of it " * 100})
    assert row["prompt"] == "The" and row["completion"].startswith("first\n\nwords of it")
    assert len(f"{row['prompt']} {row['completion']}".split()) == WORDS
    for text in ("one", "", None):
        with pytest.raises(ValueError, match="at least two words"):
            opening({"text": text})
