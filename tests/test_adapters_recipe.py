"""One recipe of several adapters: which recipes it stands for, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from hfkd.recipe import RecipeError, expand, load_recipe
from hfkd.recipe.own_code import code_lines
from hfkd.record import recipe_fingerprint
from hfkd.run.build import build

LORID = Path(__file__).parent.parent / "recipes" / "lorid"
RECIPE = {
    "student": {"model": "org/small", "lora": {"r": 4}},
    "teacher": {"kind": "none"},
    "data": {"train": {"path": "rows.jsonl", "columns": {"prompt": "question"}}, "prompt": {"separator": "--"}},
    "loss": {"terms": [{"kind": "cross_entropy"}]},
    "evaluation": {"shots": [0]},
    "training": {"output_dir": "out", "max_steps": 3, "run_name": "all"},
    "hub": {"push": True, "repo_id": "me/it", "base": "org/small"},
    "adapters": {
        "quick": {"data": {"train": {"columns": {"completion": "short"}}}, "training": {"learning_rate": "2e-4"}},
        "slow": {"data": {"train": {"columns": {"completion": "long"}}}, "evaluation": None},
    },
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def faults(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_each_adapter_is_a_recipe_of_its_own(recipe_file):
    """What an adapter says of itself must not wipe out the section around it, nor reach another adapter."""
    parts = expand(load_recipe(recipe_file))
    assert list(parts) == ["quick", "slow"]
    quick, slow = parts["quick"], parts["slow"]
    assert quick.data.train.columns == {"prompt": "question", "completion": "short"}
    assert slow.data.train.columns == {"prompt": "question", "completion": "long"}
    assert quick.data.prompt.separator == slow.data.prompt.separator == "--"
    assert (quick.evaluation.shots, slow.evaluation) == ([0], None)
    assert quick.training == {
        "output_dir": "out/quick",
        "max_steps": 3,
        "run_name": "all-quick",
        "learning_rate": 2e-4,
    }
    assert slow.training == {"output_dir": "out/slow", "max_steps": 3, "run_name": "all-slow"}
    assert (quick.hub.repo_id, slow.hub.repo_id) == ("me/it-quick", "me/it-slow"), "one would overwrite the other"
    assert not quick.adapters and not slow.adapters


def test_without_adapters_nothing_changes(recipe_file):
    """A recipe of before must be the same object, and have the fingerprint that its finished runs wrote down."""
    plain = {key: value for key, value in RECIPE.items() if key != "adapters"}
    recipe_file.write_text(yaml.safe_dump(plain))
    recipe = load_recipe(recipe_file)
    assert expand(recipe) == {"": recipe} and expand(recipe)[""] is recipe
    before = {key: value for key, value in recipe.resolved().items() if key != "adapters"}
    assert recipe_fingerprint(recipe.resolved()) == recipe_fingerprint(before)


def test_a_recipe_survives_being_written(recipe_file, tmp_path):
    """The folder's recipe.yaml must stand for the same runs as the file that it came from."""
    recipe = load_recipe(recipe_file)
    again = tmp_path / "again.yaml"
    again.write_text(json.dumps(recipe.resolved()))
    assert {name: one.resolved() for name, one in expand(load_recipe(again)).items()} == {
        name: one.resolved() for name, one in expand(recipe).items()
    }


def test_a_section_of_another_kind_is_not_merged(recipe_file):
    """The keys of one kind of teacher mean nothing to another: a self-teacher with a model's name would be refused."""
    teacher = "teacher={kind: local, model: org/large, dtype: bfloat16}"
    parts = expand(load_recipe(recipe_file, [teacher, "adapters.quick.teacher={kind: none}"]))
    assert (parts["quick"].teacher.kind, parts["quick"].teacher.model) == ("none", None)
    assert parts["slow"].teacher.model == "org/large"
    kept = expand(load_recipe(recipe_file, [teacher, "adapters.quick.teacher={revision: v2}"]))["quick"].teacher
    assert (kept.kind, kept.model, kept.revision) == ("local", "org/large", "v2")


def test_lists_take_the_place_of_lists(recipe_file):
    """Terms that pile up would train an objective that nobody wrote."""
    term = "adapters.quick.loss.terms=[{kind: cross_entropy, weight: 2}]"
    parts = expand(load_recipe(recipe_file, [term]))
    assert [len(part.loss.terms) for part in parts.values()] == [1, 1]
    assert [part.loss.terms[0].weight for part in parts.values()] == [2.0, 1.0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("student.lora=null", "adapters: are adapters on one base, and student.lora isn't given"),
        ("adapters={lora: {}}", "adapters: got the name 'lora'; expected letters"),
        ("adapters={../up: {}}", "adapters: got the name '../up'; expected letters"),
        ("adapters={a.b: {}}", "adapters: got the name 'a.b'"),
        ("adapters={Quick: {}, quick: {}}", "adapters: 'quick' would share its folder"),
        ("adapters.quick.training.output_dir=x", "adapters.quick.training.output_dir: is training.output_dir/quick"),
        ("adapters.quick.student={model: b}", "adapters.quick.student: unknown key"),
        ("adapters.quick.data.trian={path: x}", "adapters.quick.data.trian: unknown key; did you mean train"),
        ("adapters.quick.training.max_stesp=3", "adapters.quick.training.max_stesp: unknown key; did you mean max_st"),
        ("adapters.quick.loss.terms=[{kind: forward_kl}]", "adapters.quick.loss.terms: forward_kl asks for a teacher"),
        ("adapters.slow.data.max_length=0", "adapters.slow.data.max_length: got 0"),
    ],
)
def test_faults_name_the_adapter(recipe_file, override, words):
    """A fault that is found when the second adapter begins costs the time of the first."""
    assert words in faults(recipe_file, override)


def test_a_fault_of_all_adapters_is_told_once(recipe_file):
    """The same line for each adapter hides the one fault behind many."""
    text = faults(recipe_file, "training.max_stesp=3")
    assert text.count("max_stesp") == 1 and "adapters." not in text


def test_a_recipe_of_adapters_is_no_single_run(recipe_file):
    """Taken for one run, it would train the common part, without what makes any adapter."""
    recipe = load_recipe(recipe_file)
    with pytest.raises(ValueError, match=re.escape("trains several adapters (quick, slow)")):
        build(recipe, dry=True)


def test_own_code_of_an_adapter_is_told(recipe_file):
    """A user is told of the code that a recipe brings before any of it runs, wherever in the recipe it stands."""
    recipe = load_recipe(recipe_file, ["adapters.quick.data.prompt.builder='mine:prompts'"])
    assert "  mine:prompts (adapters.quick.data.prompt.builder)" in code_lines(recipe)
    trusting = "adapters.slow.teacher={kind: local, model: org/odd, trust_remote_code: true}"
    assert any("org/odd (adapters.slow.teacher" in line for line in code_lines(load_recipe(recipe_file, [trusting])))


def test_the_paths_of_an_adapter_are_found_beside_the_recipe(recipe_file, tmp_path, monkeypatch):
    """A file that is named in an adapter must be found like one that all adapters share."""
    (tmp_path / "own.jsonl").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sections = yaml.safe_load(recipe_file.read_text())
    sections["adapters"]["quick"]["data"]["train"]["path"] = "own.jsonl"
    recipe_file.write_text(yaml.safe_dump(sections))
    assert expand(load_recipe(recipe_file))["quick"].data.train.path == str(tmp_path / "own.jsonl")


def test_the_shipped_recipe_builds_and_its_rows_are_right():
    """A recipe with a dead key, a sum that is wrong, or a test question that is trained on."""
    for one in expand(load_recipe(LORID / "lorid.yaml")).values():
        build(one, dry=True)
    train, test = (
        [json.loads(line) for line in (LORID / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "test")
    )
    assert (len(train), len(test)) == (200, 40)
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    for row in [*train, *test]:
        sums = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["rationale"])
        assert sums, row
        for left, sign, right, value in sums:
            found = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
            assert int(value) == (int(left) // int(right) if sign == "/" else found[sign]), row
        assert row["answer"] == sums[-1][3] and row["rationale"].endswith(f"The answer is {row['answer']}.")
        assert not re.search(r"\d", " ".join(row["knowledge"])), (
            "knowledge is general: it names no number of a question"
        )
