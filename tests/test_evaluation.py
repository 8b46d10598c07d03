"""`hfkd evaluate`: whose answers they are, what is kept and not made again, and what can't be asked."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import yaml
from evaluating import call, evaluate, make_folder, note_asked, train
from rich.console import Console

import hfkd.run.evaluation
import hfkd.run.provenance
from hfkd.eval.comparison.compare import compare_sides
from hfkd.eval.comparison.sides import load_sides
from hfkd.eval.generation import generation_quality

SHORT = ["evaluation.shots=[0, 2]", "evaluation.forgetting=[{path: other.jsonl, size: 3, demonstrations: 2}]"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_folder(tmp_path, monkeypatch)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return note_asked(monkeypatch)


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole"])
def test_a_runs_folder_answers_as_its_report_says(folder: Path, whole: bool) -> None:
    """Weights that are loaded onto the wrong model, or not at all, give the base's figures under the run's name."""
    more = ["student.lora=null", "teacher.weights=frozen_copy"] if whole else []
    report = train(*more)
    found = evaluate(recipe="out/recipe.yaml", run_folder=Path("out"), base=True, fidelity=True)
    for stage in ("before", "after"):
        assert found[stage]["k_shot"]["result"]["details"] == report["k_shot_details"][stage]
        ours, theirs = found[stage]["fidelity"]["result"], report["fidelity"][stage]
        for name in ("tokens", "agreement", "forward_kl", "reverse_kl", "captured_mass", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (stage, name)
        for side in ("student", "teacher"):
            assert ours[side]["perplexity"] == pytest.approx(theirs[side]["perplexity"], rel=1e-4), (stage, side)
    moved = found["after"]["fidelity"]["result"]["forward_kl"] - found["before"]["fidelity"]["result"]["forward_kl"]
    assert abs(moved) > 1e-4, "the trained weights must not be the published ones"
    kept = json.loads(Path("out/predictions.jsonl").read_text().splitlines()[-1])
    assert kept in found["after"]["k_shot"]["result"]["predictions"]


def test_what_is_done_is_not_done_again(folder: Path, asked: list[str]) -> None:
    """An evaluation of hours that is started again must go on, and a changed setting must not be answered from the
    file."""
    train("evaluation=null")
    options = {"adapter": Path("out"), "json_path": Path("scores.json")}
    first = evaluate(*SHORT, **options)
    assert asked == ["verbs.jsonl", "other"]
    assert evaluate(*SHORT, **options) == first and len(asked) == 2
    evaluate(SHORT[0], "evaluation.forgetting=[{path: other.jsonl, size: 2, demonstrations: 2}]", **options)
    assert asked[2:] == ["other"], "only the task whose rows differ is asked"
    evaluate(*SHORT, "evaluation.max_new_tokens=2", **options)
    assert asked[3:] == ["verbs.jsonl", "other"]
    Path("verbs.jsonl").write_text(Path("verbs.jsonl").read_text().replace('ed"', 't"'))
    evaluate(*SHORT, "evaluation.max_new_tokens=2", **options)
    assert asked[5:] == ["verbs.jsonl"], "other rows are another exam, though the file has its old name"
    evaluate(*SHORT, "evaluation.max_new_tokens=2", "evaluation.batch_size=1", **options)
    assert len(asked) == 6, "how many rows run together decides nothing"


def test_other_weights_take_the_place_of_the_old_ones(folder: Path, asked: list[str]) -> None:
    """A run that was trained anew under its old name must not be shown with its old figures, of any task."""
    words = io.StringIO()
    train("evaluation=null")
    options = {"run_folder": Path("out"), "json_path": Path("scores.json"), "base": True}
    evaluate(*SHORT, **options)
    train("evaluation=null", "training.run_policy=overwrite", "training.learning_rate=0.3")
    found = evaluate(**options, console=Console(file=words, width=200))
    assert (
        asked[4:] == ["verbs.jsonl", "verbs.jsonl"]
        and "the results of after were of other weights" in words.getvalue()
    )
    assert set(found["after"]) == {"k_shot"}, "what was of the old weights is gone"
    assert "forgetting.other" in found["before"], "the base is the same as it was"


def test_what_was_done_before_a_failure_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in the last task must not cost the first ones."""
    ask = hfkd.run.evaluation.ask

    def dies(run, model, task, description):
        if task.name == "other":
            raise KeyboardInterrupt
        return ask(run, model, task, description)

    monkeypatch.setattr(hfkd.run.evaluation, "ask", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*SHORT, json_path=Path("scores.json"))
    kept = json.loads(Path("scores.json").read_text())["results"]["before"]
    assert set(kept) == {"k_shot"} and kept["k_shot"]["result"]["predictions"]
    monkeypatch.setattr(hfkd.run.evaluation, "ask", ask)
    assert set(evaluate(*SHORT, json_path=Path("scores.json"))["before"]) == {"k_shot", "forgetting.other"}
    assert not list(folder.glob(".scores*")), "no draft stays behind"


def test_a_finished_file_needs_no_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading seventy billion weights to print a table is a waste."""
    evaluate(json_path=Path("scores.json"))

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("hfkd.run.subjects.load_student", loaded)
    assert evaluate(json_path=Path("scores.json"))["before"]["k_shot"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"k_shot": {}}', "is JSON of another kind"),
        ("notes", "is no JSON"),
        ('{"kind": "hfkd evaluation", "schema": 2}', "has version 2"),
        ('{"kind": "hfkd evaluation", "schema": 1, "weights": {}, "results": {"after": {"k_shot": 3}}}', "is damaged"),
    ],
)
def test_a_file_of_another_kind_is_left_alone(folder: Path, content: str, words: str) -> None:
    """`--json package.json` must not cost the user package.json, nor an hour before it is refused."""
    Path("mine.json").write_text(content)
    result = call("recipe.yaml", "student.model=nowhere", "--json", "mine.json")
    assert result.code == 2 and words in result.err and "is left as it is" in result.err
    assert Path("mine.json").read_text() == content


def test_a_recipe_in_json(folder: Path) -> None:
    """A program that writes recipes writes JSON."""
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["training"]["learning_rate"] = 2e-5
    Path("recipe.json").write_text(json.dumps(recipe, indent=2))
    result = call("recipe.json", "--json", "scores.json")
    assert result.code == 0, result.err
    found = json.loads(Path("scores.json").read_text())["results"]["before"]["k_shot"]["result"]
    assert found == evaluate()["before"]["k_shot"]["result"]
    assert str(folder) not in Path("scores.json").read_text()


def test_both_stages_of_a_file_can_be_compared(folder: Path) -> None:
    """The remedy that `hfkd compare` names for an older run must work."""
    train("evaluation=null")
    result = call("out", "evaluation={size: 4, shots: [0], max_new_tokens: 3}", "--base", "--json", "both.json")
    assert result.code == 0, result.err
    found = compare_sides(load_sides([Path("both.json")]))
    assert found["first"] == "before" and [row["side"] for row in found["rows"]] == ["after"]


def test_a_run_and_its_evaluation_were_asked_alike(folder: Path) -> None:
    """A note about other ways of asking that stands under every comparison is read by nobody."""
    train(*SHORT)
    evaluate(recipe="out/recipe.yaml", run_folder=Path("out"), json_path=Path("same.json"))
    other = {"recipe": "out/recipe.yaml", "run_folder": Path("out"), "json_path": Path("other.json")}
    evaluate("evaluation.max_new_tokens=2", **other)
    same = compare_sides(load_sides([Path("out"), Path("same.json")]))
    assert not [line for line in same["warnings"] if "other ways" in line]
    assert {row["task"]: row["difference"] for row in same["rows"]} == {"verbs.jsonl": 0.0, "other": 0.0}
    told = " ".join(compare_sides(load_sides([Path("out"), Path("other.json")]))["warnings"])
    assert "evaluation.max_new_tokens is 3 and 2." in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipe.yaml", "--base"], "--base puts .* beside a trained one, and none is given"),
        (["recipe.yaml", "evaluation.shots=[]"], "evaluation.shots is empty and nothing else is asked for"),
        (["recipe.yaml", "evaluation=null"], "the recipe has no evaluation section"),
        (
            ["recipe.yaml", "evaluation=null", "--lm-eval-limit", "3"],
            "--lm-eval-limit says how .* add --lm-eval TASKS",
        ),
        (
            ["recipe.yaml", "teacher={kind: none}", "loss.terms=[{kind: cross_entropy}]", "--fidelity"],
            "--fidelity needs a teacher .* teacher.kind is none",
        ),
        (["recipe.yaml", "teacher.kind=ema", "teacher.weights=null", "--fidelity"], "teacher.(kind|weights)"),
        (["recipe.yaml", "teacher={kind: ema}", "--fidelity"], "teacher.kind ema is a model of the training alone"),
        (["model"], "model has no recipe.yaml; expected the folder of a run"),
        (["empty"], "empty has no weights: neither adapter_config.json"),
        (["empty", "--adapter", "empty"], "--adapter names weights, and empty is a run with its own"),
        (["recipe.yaml", "--adapter", "model"], "model has no adapter_config.json; expected the folder of a LoRA run"),
    ],
    ids=str,
)
def test_what_is_asked_for_without_what_it_needs(folder: Path, arguments: list[str], words: str) -> None:
    """Each of these costs an hour, or gives another model's figures, when it is found late or not at all."""
    Path("empty").mkdir()
    Path("empty/recipe.yaml").write_text(Path("recipe.yaml").read_text())
    result = call(*arguments)
    assert result.code == 2 and result.err.startswith("Error: "), result.err
    assert re.search(words, " ".join(result.err.split())), result.err


def test_how_it_writes_by_hand() -> None:
    """A model that says one thing over and over, or nothing, must be seen whatever its accuracy is."""
    texts = ["a b a b", "", "a b c d a b c d a b c d"]
    found = generation_quality(texts, ["x", "y", "z"], tokens=[4, 0, 12], cut=1)
    assert found["tokens"] == {"mean": pytest.approx(16 / 3), "median": 4.0, "longest": 12}
    assert found["cut"] == found["empty"] == pytest.approx(1 / 3)
    assert found["distinct_1"] == pytest.approx(4 / 16)
    assert found["distinct_2"] == pytest.approx(5 / 14), "ab ba bc cd da of 3 + 11 pairs"
    assert found["repeated"] == pytest.approx((0 + 5 / 9) / 2), "nine runs of four words, four of them different"
    assert "likeness" not in found, "BLEU of single words says nothing"
    empty = generation_quality([""], ["x"], tokens=[0], cut=0)
    assert empty["distinct_1"] is None and empty["repeated"] is None
    gold = ["the answer is five because two and three make five"]
    assert generation_quality(gold, gold, tokens=[9], cut=0)["likeness"] == {
        "bleu": pytest.approx(100), "rouge_l": pytest.approx(1)
    }  # fmt: skip
    with pytest.raises(ValueError, match="got 0 texts"):
        generation_quality([], [], tokens=[], cut=0)
