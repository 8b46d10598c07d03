"""`hfkd evaluate` and what a result is of: the teacher that taught, rows and model of a run, own code, versions."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer
from evaluating import VERBS, call, evaluate, make_folder, note_asked, train

import hfkd.run.evaluation
import hfkd.run.provenance
from hfkd.eval.results import fingerprint_of
from hfkd.recipe import load_recipe
from hfkd.recipe.schema import Recipe
from hfkd.recipe.source import apply_overrides
from hfkd.run.against_teacher import deciding_of
from hfkd.run.expected import name_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_folder(tmp_path, monkeypatch)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return note_asked(monkeypatch)


SELF_MEMBER = "members: {a: {kind: local, model: other}, b: {kind: self, weights: %s}}"


@pytest.mark.parametrize("weights", ["frozen_copy", "adapter_off", "live"])
@pytest.mark.parametrize("kind", ["mixture", "routed"])
def test_a_member_that_is_the_student_is_the_one_that_taught(folder: Path, kind: str, weights: str) -> None:
    """A copy of the trained student in the place of the published one is a teacher that nobody learned from."""
    make_model(1).save_pretrained("other")
    make_tokenizer().save_pretrained("other")
    rows = [{"prompt": v, "completion": v + "ed", "who": "ab"[place % 2]} for place, v in enumerate(VERBS)]
    Path("verbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    column = "column: who, " if kind == "routed" else ""
    more = [] if weights == "adapter_off" else ["student.lora=null"]
    report = train(f"teacher={{kind: {kind}, {column}{SELF_MEMBER % weights}}}", "evaluation.size=8", *more)
    found = evaluate(recipe="out/recipe.yaml", run_folder=Path("out"), base=True, fidelity=True)
    for stage in ("before", "after"):
        ours, theirs = found[stage]["fidelity"]["result"], report["fidelity"][stage]
        for name in ("agreement", "forward_kl", "reverse_kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (stage, name)
    before, after = (report["fidelity"][stage]["forward_kl"] for stage in ("before", "after"))
    assert abs(before - after) > 1e-4, "a run that moves nothing would show nothing"


@pytest.mark.parametrize(
    "change",
    [
        *("members.a.weight=0.5", "members.a.dtype=bfloat16", "members.a.load_kwargs={num_hidden_layers: 1}"),
        *("members.b.weights=frozen_copy", "members.a.model=model", "members.a.kind=codes:One"),
    ],
)
def test_another_teacher_is_another_question(folder: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fidelity to the teacher that was asked before would be shown as fidelity to this one."""
    monkeypatch.syspath_prepend(str(folder))
    make_model(1).save_pretrained("other")
    Path("codes.py").write_text("from hfkd.teachers import LocalTeacher\nOne = LocalTeacher\n")
    mixture = f"teacher={{kind: mixture, {SELF_MEMBER % 'adapter_off'}}}"
    recipe = load_recipe("recipe.yaml", [mixture])
    tree = recipe.resolved()
    assert fingerprint_of(deciding_of(Recipe.model_validate(tree))) == fingerprint_of(deciding_of(recipe))
    apply_overrides(tree, [f"teacher.{change}"])
    assert fingerprint_of(deciding_of(Recipe.model_validate(tree))) != fingerprint_of(deciding_of(recipe))


def test_how_a_lone_teacher_is_loaded_is_part_of_the_question(folder: Path) -> None:
    """A teacher of one layer fewer, or in 4 bits, is another teacher."""
    plain = fingerprint_of(deciding_of(load_recipe("recipe.yaml", ["teacher={kind: local, model: model}"])))
    for more in ("load_kwargs: {num_hidden_layers: 1}", "dtype: bfloat16"):
        other = load_recipe("recipe.yaml", [f"teacher={{kind: local, model: model, {more}}}"])
        assert fingerprint_of(deciding_of(other)) != plain, more


def test_tasks_of_one_name_are_all_kept(folder: Path, asked: list[str]) -> None:
    """The second of two files called test.jsonl must not take the first one's place, nor be asked at every call."""
    for number, name in enumerate(("x/test.jsonl", "y/test.jsonl", "verbs.jsonl.jsonl")):
        Path(name).parent.mkdir(exist_ok=True)
        rows = [{"prompt": f"{verb} {number}", "completion": verb} for verb in VERBS]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"x/test.jsonl": 3, "y/test.jsonl": 5, "verbs.jsonl.jsonl": 2}
    sections = [f"{{path: {name}, size: {size}, demonstrations: 2}}" for name, size in sizes.items()]
    others = f"evaluation.forgetting=[{', '.join(sections)}]"
    found = evaluate(others, json_path=Path("scores.json"))["before"]
    assert [len(entry["result"]["predictions"]) for entry in found.values()] == [4, 3, 5, 2]
    assert len(asked) == len(set(asked)) == 4
    assert evaluate(others, json_path=Path("scores.json"))["before"] == found and len(asked) == 4
    names = [{line["task"] for line in entry["result"]["predictions"]} for entry in found.values()]
    assert len(set.union(*names)) == 4, "hfkd compare finds a task by its name"


@pytest.fixture
def moved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in another working folder than it was made in, where a model and rows of its own names are."""
    train(f"student.model={folder}/model", f"data.train.path={folder}/verbs.jsonl")
    there = folder / "there"
    there.mkdir()
    shutil.copytree("out", there / "moved")
    monkeypatch.chdir(there)
    make_model(7).save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    Path("verbs.jsonl").write_text("".join(json.dumps({"prompt": v, "completion": v + "ing"}) + "\n" for v in VERBS))
    return there


def test_a_run_is_not_asked_other_rows_unless_they_are_chosen(moved: Path) -> None:
    """Elsewhere a file of the same name holds another exam, whose figures would stand under the run's name."""
    record = json.loads(Path("moved/run.json").read_text())
    del record["student"]["weights"]  # the model here is another one, too, and would be told first
    Path("moved/run.json").write_text(json.dumps(record))
    result = call("moved")
    assert result.code == 2 and "aren't those of the run" in result.err and "--as-found" in result.err, result.err
    assert "data.train.path" in result.err and "verbs.jsonl" in result.err
    assert call("moved", "evaluation.max_new_tokens=2").code == 2, "that chooses no rows"
    for chosen in ("--as-found", "data.train.path=verbs.jsonl"):
        result = call("moved", chosen)
        assert result.code == 0 and "Note: the evaluation rows" in result.out, result.err
    result = call("moved", f"data.train.path={moved.parent}/verbs.jsonl")
    assert result.code == 0 and "Note:" not in result.out, result.err


def test_a_run_is_not_put_on_another_model_unless_it_is_chosen(moved: Path) -> None:
    """An adapter on the wrong base gives figures that are nobody's."""
    rows = f"data.train.path={moved.parent}/verbs.jsonl"
    record = json.loads(Path("moved/run.json").read_text())
    Path("model").rename("elsewhere")
    result = call("moved", rows)
    assert result.code == 2 and "student.model" in result.err and "folder" in result.err, result.err
    result = call("moved", rows, "student.model=elsewhere")
    assert result.code == 0, result.err
    Path("elsewhere").rename("model")
    record["student"]["weights"] = name_of(f"{moved.parent}/model")
    Path("moved/run.json").write_text(json.dumps(record))
    result = call("moved", rows)
    assert result.code == 2 and "model isn't the one" in result.err and "--as-found" in result.err, result.err
    result = call("moved", rows, f"student.model={moved.parent}/model")
    assert result.code == 0 and "Note:" not in result.out, result.err
    result = call("moved", rows, "student.model=model")
    assert result.code == 0 and "Note: the student's model isn't the one" in result.out, result.err
    record["student"] = {"source": "hub"}
    Path("moved/run.json").write_text(json.dumps(record))
    result = call("moved", rows)
    assert result.code == 2 and "from the hub" in result.err, result.err
    Path("moved/run.json").write_text("{")
    result = call("moved", rows)
    assert result.code == 2 and "run.json is damaged" in result.err, result.err


def test_own_code_and_versions_decide(folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mended prompt, or a mended way of reading answers, must not be answered by what was there before."""
    monkeypatch.syspath_prepend(str(folder))
    code = "def build(row, demonstrations=(), *_, **__):\n    return '{} ' + row['prompt'] + ':'\n"
    options = {"json_path": Path("scores.json")}
    for times, word in enumerate(("Ask", "Translate"), 1):
        Path("ownprompt.py").write_text(code.replace("{}", word))
        importlib.invalidate_caches()
        sys.modules.pop("ownprompt", None)
        for _ in range(2):
            evaluate("data.prompt.builder=ownprompt:build", **options)
            assert len(asked) == times
    versions = hfkd.run.provenance.package_versions()
    for times, package in enumerate(("hfkd", "torch", "transformers"), 3):
        monkeypatch.setattr(hfkd.run.provenance, "package_versions", lambda name=package: {**versions, name: "0.0.1"})
        evaluate("data.prompt.builder=ownprompt:build", **options)
        assert len(asked) == times, package


def test_own_code_that_decides_nothing(folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that was changed after the training has no say in what the trained model answers."""
    monkeypatch.syspath_prepend(str(folder))
    for text in ("def one(row): ...\n", "def one(row): ...\n\n"):
        Path("ownweights.py").write_text(text)
        evaluate("data.token_weights=ownweights:one", json_path=Path("scores.json"))
    assert len(asked) == 1


@pytest.mark.parametrize(
    "setting",
    [
        *("report_to=wandb", "tf32=true", "deepspeed=nowhere.json", "optim=adamw_bnb_8bit"),
        "load_best_model_at_end=true",
    ],
)
def test_the_training_machines_accessories_are_not_needed(folder: Path, setting: str) -> None:
    """A run from a machine with trackers and an Ampere GPU is evaluated on a laptop."""
    assert evaluate(f"training.{setting}", fidelity=True)["before"]["fidelity"]
