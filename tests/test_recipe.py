"""Recipes: what is read, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
from inspect import signature
from pathlib import Path

import pytest
import yaml

from hfkd.data.prompts import PromptStyle
from hfkd.losses import LOSSES, Divergence
from hfkd.recipe import Recipe, RecipeError, load_recipe
from hfkd.recipe.schema import PromptSection

BASE = {
    "student": {"model": "org/small", "lora": {"r": 4}},
    "teacher": {"kind": "self"},
    "data": {"train": {"path": "verbs.jsonl"}, "demonstrations": {"count": 8}, "student_shots": [0, 1]},
    "evaluation": {"shots": [0, 1, 8]},
    "training": {"max_steps": 30},
}
# Neither demonstrations nor a column that could hold a context.
ALONE = (
    *("data.demonstrations.count=0", "data.student_shots=0", "evaluation.shots=0"),
    "data.train={path: 'reasoning_gym:a'}",
    "evaluation=null",
)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def faults(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_defaults_are_filled_in(recipe_file: Path) -> None:
    """A run record that leaves defaults out can't be repeated after a default changed."""
    recipe = load_recipe(recipe_file)
    resolved = recipe.resolved()
    assert resolved["loss"]["terms"] == [{"kind": "forward_kl", "weight": 1.0, "name": None}]
    assert resolved["student"]["dtype"] == "float32"
    assert resolved["training"]["output_dir"] == "outputs/base"


def test_a_resolved_recipe_is_a_recipe(recipe_file: Path) -> None:
    """The recipe that lies beside a card must run as it stands."""
    resolved = load_recipe(recipe_file).resolved()
    again = recipe_file.with_name("again.yaml")
    again.write_text(yaml.safe_dump(resolved))
    assert load_recipe(again).resolved() == resolved


def test_prompt_defaults_are_those_of_the_style() -> None:
    """Two places for one default drift apart, and a recipe would prompt otherwise than the Python interface."""
    section, style = PromptSection().model_dump(), PromptStyle()
    for field in dataclasses.fields(style):
        value = getattr(style, field.name)
        assert section.pop(field.name) == (list(value) if isinstance(value, tuple) else value), field.name
    assert not section


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["training.learning_rate=2e-4"], "training.learning_rate", 2e-4),
        (["loss.terms.0.kind=reverse_kl", "loss.terms.0.weight=2"], "loss.terms.0.weight", 2.0),
        (["loss.terms=[{kind: forward_kl}]", "loss.terms.1.kind=cross_entropy"], "loss.terms.1.kind", "cross_entropy"),
        (["loss.terms.0={kind: forward_kl, temperature: 2e0}"], "loss.terms.0.temperature", 2.0),
        (["data.student_shots={min: 1, max: 3}"], "data.student_shots", [1, 2, 3]),
        (["data.student_shots=1"], "data.student_shots", [1]),
        (["data.prompt.system='Answer shortly: please.'"], "data.prompt.system", "Answer shortly: please."),
        (["data.prompt.stop=[END]"], "data.prompt.stop", ["END"]),
        (["student.lora.alpha=1e1"], "student.lora.alpha", 10.0),
        (["hub.repo_id=me/it", "hub.push=true"], "hub.push", True),
        (["evaluation.forgetting=[{path: plurals.jsonl}]"], "evaluation.forgetting.0.size", 48),
        (["data.train.path=a=b.jsonl"], "data.train.path", "a=b.jsonl"),
    ],
)
def test_overrides(recipe_file: Path, overrides: list[str], path: str, value: object) -> None:
    """An override that lands elsewhere, or as text, trains something other than what was typed."""
    place: object = load_recipe(recipe_file, overrides).resolved()
    for part in path.split("."):
        place = place[int(part)] if isinstance(place, list) else place[part]
    assert place == value


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind, loss in LOSSES.items()
        if issubclass(loss, Divergence) and "temperature" in signature(loss).parameters
    ],
)
def test_every_divergence_takes_a_scheduled_temperature(recipe_file: Path, kind: str) -> None:
    """Prevents a loss whose signature refuses in a recipe what it takes from Python."""
    term = f"{{kind: {kind}, temperature: {{schedule: linear, start: 4.0, end: 1.0}}}}"
    marks = ["data.revise=[{kind: private}]"] if kind == "swing" else []
    found = load_recipe(recipe_file, [f"loss.terms=[{{kind: cross_entropy}}, {term}]", *marks])
    assert found.resolved()["loss"]["terms"][1]["temperature"]["start"] == 4.0


def test_weights_and_temperatures_may_be_schedules(recipe_file: Path) -> None:
    """Prevents a schedule that works from Python alone."""
    schedule = {"schedule": "linear", "start": 4.0, "end": 1.0}
    term = "{kind: forward_kl, weight: {schedule: linear, start: 4.0, end: 1.0}, temperature: "
    found = load_recipe(recipe_file, [f"loss.terms=[{term}{{schedule: linear, start: 4.0, end: 1.0}}}}]"])
    assert found.resolved()["loss"]["terms"][0] == {
        "kind": "forward_kl",
        "weight": schedule,
        "name": None,
        "temperature": schedule,
    }
    wrong = f"loss.terms=[{term}{{schedule: linear, start: 4.0, end: 0}}}}]"
    assert "forward_kl: temperature is" in faults(recipe_file, wrong)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training", "got 'training'; expected section.key=value"),
        ("data.prompt.system=[a", "data.prompt.system: '[a' is no valid YAML; quote it"),
        ("data.prompt.system=a: b", "data.prompt.system: got {'a': 'b'} (dict); expected a valid string"),
        ("a..b=1", "expected section.key=value"),
        ("student.model.name=x", "student.model is 'org/small', a plain value; nothing below it can be set"),
        ("data.student_shots.5=1", "data.student_shots.5: expected an index from 0 to 2 of a list, got '5'"),
        ("data.student_shots.first=1", "expected an index from 0 to 2"),
        ("hub.repo=me/it", "hub.repo: unknown key; did you mean repo_id?"),
    ],
)
def test_wrong_overrides(recipe_file: Path, override: str, words: str) -> None:
    """A typing slip on the command line must not make a new key that nothing reads."""
    assert words in faults(recipe_file, override)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.demonstration.count=3"], "data.demonstration: unknown key; did you mean demonstrations"),
        (["studnet.model=x"], "studnet: unknown key; did you mean student?"),
        (["student.lora.rank=4"], "student.lora.rank: unknown key"),
        (
            ["student.dtype=bf16"],
            "student.dtype: got 'bf16' (str); expected 'float32', 'bfloat16', 'float16' or 'auto'",
        ),
        (["student.lora.r=0"], "student.lora.r: got 0 (int); expected greater than or equal to 1"),
        (["student.lora.dropout=1"], "student.lora.dropout: got 1 (int); expected less than 1"),
        (["student.lora.alpha=true"], "student.lora.alpha: got True; expected a number, not true or false"),
        (["student.lora.target_modules=3"], "student.lora.target_modules: got 3; expected a name"),
        (
            ["student.trust_remote_code=maybe"],
            "student.trust_remote_code: got 'maybe' (str); expected a valid boolean",
        ),
        (["student.model="], "student: expected model (a whole model) or init"),
        (
            ["data.demonstrations.count=eight"],
            "data.demonstrations.count: got 'eight' (str); expected a valid integer",
        ),
        (
            ["data.demonstrations.count=-1"],
            "data.demonstrations.count: got -1 (int); expected greater than or equal to 0",
        ),
        (["data.demonstrations.count=true"], "data.demonstrations.count: got True (bool); expected a valid integer"),
        (
            ["data.demonstrations={path: a.jsonl, column: b, count: 1}"],
            "expected path (a file of demonstrations) or column",
        ),
        (["data.demonstrations={path: a.jsonl}"], "names where demonstrations come from, but count is 0"),
        (["data.student_shots={min: 3, max: 1}"], "expected min <= max, and min is 3 while max is 1"),
        (["data.student_shots={from: 3}"], "expected a list of numbers of demonstrations, or {min: 1, max: 3}"),
        (["data.student_shots=[]"], "data.student_shots: got [] (list); expected"),
        (
            ["data.generation.temperature=-1"],
            "data.generation.temperature: got -1 (int); expected greater than or equal",
        ),
        (["data.generation.top_p=0"], "data.generation.top_p: got 0 (int); expected greater than 0"),
        (["data.prompt.question=Say it"], "data.prompt.question is 'Say it' without the fields ['prompt']"),
        (["data.prompt.builder=mine"], "data.prompt.builder: got 'mine'; expected package.module:function"),
        (["data.answer=techer"], "did you mean teacher?"),
        (["data.too_long=cut"], "data.too_long: got 'cut' (str); expected 'raise' or 'drop'"),
        (["data.train=null"], "data.train: got None (NoneType); expected a section with keys: path, name"),
        (["data.train.format=gsm8"], "data.train.format: there is no format 'gsm8'; did you mean gsm8k?"),
        (["loss.terms=[]"], "loss.terms: got [] (list); expected"),
        (["training.max_steps=0"], "training.max_steps: got 0; expected at least 1"),
        (["training.learning_rate=-1"], "training.learning_rate: got -1; expected at least 0"),
        (
            ["training.per_device_train_batch_size=0"],
            "training.per_device_train_batch_size: got 0; expected at least 1",
        ),
        (["training.eval_strategy=steps", "evaluation=null"], "training.eval_strategy: got 'steps', and there is no"),
        (["loss.terms=[{weight: 1}]"], "loss.terms.0.kind: is required and is not given"),
        (["loss.terms.0.kind=forwrd_kl"], "loss.terms.0.kind: there is no loss 'forwrd_kl'; did you mean forward_kl"),
        (
            ["loss.terms=[{kind: forward_kl, temprature: 2}]"],
            "loss.terms.0.temprature: unknown key; did you mean temp",
        ),
        (
            ["loss.terms=[{kind: forward_kl, temperature: hot}]"],
            "loss.terms.0.temperature: got 'hot' (str); expected a nu",
        ),
        (["loss.terms=[{kind: forward_kl, temperature: 0}]"], "temperature is 0; expected a number above 0"),
        (
            ["loss.terms=[{kind: forward_kl, weight: -1}]"],
            "loss.terms.0.weight: got -1; expected greater than or e",
        ),
        (["loss.terms=[{kind: forward_kl}, {kind: forward_kl}]"], "Two terms share a name"),
        (["loss.terms=[{kind: sinkhorn}]"], "would stand alone"),
        (
            ["evaluation.extract=last_numbr"],
            "evaluation.extract: there is no extractor 'last_numbr'; did you mean last_n",
        ),
        (
            ["evaluation.forgetting=[{path: x, extract: foo}]"],
            "evaluation.forgetting.0.extract: there is no extractor",
        ),
        (["evaluation.forgetting=[{size: 3}]"], "evaluation.forgetting.0.path: is required and is not given"),
        (["training.learning_rat=1"], "training.learning_rat: unknown key; did you mean learning_rate"),
        (["training.max_steps=many"], "training.max_steps: got 'many' (str); expected a whole number"),
        (["training.max_steps=3.5"], "training.max_steps: got 3.5 (float); expected a whole number"),
        (["training.learning_rate=fast"], "training.learning_rate: got 'fast' (str); expected a number"),
        (["training.bf16=1"], "training.bf16: got 1 (int); expected true or false"),
        (["training.seed=true"], "training.seed: got True (bool); expected a number"),
        (["training.max_length=3"], "training.max_length: is set by data.max_length in a recipe; give it there"),
        (["training.push_to_hub=true"], "training.push_to_hub: is set by hub.push"),
        (["training.output_dir="], "training.output_dir: got None; expected the path of a folder"),
        (["training.run_policy=resum"], "expected refuse or resume or overwrite; did you mean resume?"),
        (["hub.push=true"], "hub.repo_id: is required when hub.push is true"),
        (["hub.repo_id=https://x/y"], "hub.repo_id: got 'https://x/y'; expected owner/name"),
    ],
)
def test_wrong_values(recipe_file: Path, overrides: list[str], words: str) -> None:
    """A misspelt key or a wrong type that passes is a setting that the user believes in and the run never had."""
    assert words in faults(recipe_file, *overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["teacher.kind=selff"],
            "teacher.kind: got 'selff'; expected self, local, none, ema, snapshot, early_exit, mixture, routed, "
            "cross_tokenizer",
        ),
        (["teacher.model=org/big"], "teacher.model: got 'org/big', which a teacher of kind self doesn't use"),
        (["teacher.kind=local"], "teacher.model: is required for a teacher of kind local"),
        (
            ["teacher={kind: local, model: a/b, weights: live}"],
            "teacher.weights: got 'live', which a teacher of kind local",
        ),
        (
            ["teacher={kind: local, model: a/b, options: {x: 1}}"],
            "teacher.options: got {'x': 1}, which a teacher of kind",
        ),
        (
            ["teacher={kind: 'my.module:Mine', model: a/b}"],
            "teacher.model: got 'a/b', which a teacher of kind my.module",
        ),
        (["student.lora=null"], "teacher.weights: adapter_off needs an adapter that can be switched off"),
        (["teacher.kind=none"], "forward_kl asks for a teacher's distribution, and teacher.kind is none"),
        (["teacher.kind=none", "data.answer=teacher"], "data.answer: teacher lets the teacher write the answers, and"),
        (
            ["teacher.kind=none", "data.teacher_max_length=9"],
            "data.teacher_max_length: is given, and teacher.kind is none",
        ),
        (["data.whole_text=true"], "data.whole_text: true trains on each view's whole text"),
        (["data.student_shots=[9]"], "data.student_shots: got [9], and there are 8 demonstrations to draw from"),
        (["data.student_shots=[8]", "data.train.format=svamp"], "as many as the self-teacher reads"),
        (["data.demonstrations.count=4"], "evaluation.shots: got [0, 1, 8], and data.demonstrations.count is 4"),
        (
            ["data.demonstrations.count=0", "data.student_shots=0", "evaluation.shots=0", "data.train.format=svamp"],
            "teacher.kind: self needs a second prompt, and there is none",
        ),
        (
            ["teacher.kind=ema", *ALONE],
            "teacher.kind: ema begins as the student and reads the same prompt, and no term",
        ),
        (["teacher.kind=snapshot", *ALONE], "teacher.kind: snapshot begins as the student and reads the same prompt"),
        (
            ["teacher.weights=frozen_copy", *ALONE],
            "teacher.kind: self begins as the student and reads the same prompt",
        ),
        (["teacher.weights=live", "loss.terms=[{kind: cross_entropy}]", *ALONE], "self needs a second prompt, and"),
        (
            ["teacher={kind: cross_tokenizer, model: a/b}", "loss.terms=[{kind: span_likelihood}]", *ALONE]
            + ["data.whole_text=true"],
            "data.whole_text: true trains on each view's whole text",
        ),
        (
            ["data.answer=student", "data.generation.buffer_size=15", "training.gradient_accumulation_steps=2"],
            "data.generation.buffer_size: got 15, and a step writes 16 texts on each process "
            "(training.per_device_train_batch_size 8 times training.gradient_accumulation_steps 2)",
        ),
        (
            [
                "data.demonstrations.count=0",
                "data.student_shots=0",
                "evaluation=null",
                "data.train.path=reasoning_gym:a",
            ],
            "teacher.kind: self needs a second prompt, and there is none",
        ),
    ],
)
def test_impossible_combinations(recipe_file: Path, overrides: list[str], words: str) -> None:
    """A combination that can't work must not be found out after a model was downloaded, or never."""
    assert words in faults(recipe_file, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.terms=[{kind: sinkhorn, alone: true}]"],
        ["loss.terms=[{kind: sinkhorn}, {kind: forward_kl}]"],
        ["loss.terms=[{kind: 'my.losses:Mine', depth: 3}]"],
        ["teacher={kind: 'my.teachers:Mine', options: {depth: 3}}"],
        ["teacher.kind=none", "loss.terms=[{kind: cross_entropy}]"],
        ["loss.terms=[{kind: cross_entropy}]", "data.whole_text=true", "data.answer=teacher"],
        ["student.lora=null", "teacher.weights=frozen_copy"],
        ["teacher.weights=frozen_copy", "loss.terms=[{kind: forward_kl}, {kind: cross_entropy}]", *ALONE],
        ["teacher.kind=ema", "loss.terms=[{kind: forward_kl}, {kind: cross_entropy}]", *ALONE],
        ["teacher.kind=snapshot", "loss.terms=[{kind: adaptive_label_smoothing}]", *ALONE],
        ["teacher.kind=ema", "loss.terms=[{kind: 'my.losses:Mine'}]", *ALONE],
        ["teacher.kind=ema", "data.demonstrations.count=0", "data.student_shots=0", "evaluation.shots=0"],
        ["teacher={kind: cross_tokenizer, model: a/b}", "loss.terms=[{kind: cross_entropy}]", "data.whole_text=true"],
        ["data.answer=student", "data.generation.buffer_size=16", "training.gradient_accumulation_steps=2"],
        ["data.demonstrations.count=0", "data.student_shots=0", "evaluation.shots=0"],  # privileged_context, maybe
        ["data.train={path: 'reasoning_gym:a', columns: {privileged_context: hint}}", "evaluation=null"],
        [
            "teacher={kind: local, model: a/b}",
            "data.demonstrations.count=0",
            "data.student_shots=0",
            "evaluation=null",
        ],
    ],
)
def test_possible_combinations(recipe_file: Path, overrides: list[str]) -> None:
    """A check that refuses what works is as bad as none."""
    assert isinstance(load_recipe(recipe_file, overrides), Recipe)


def test_all_faults_are_told_at_once(recipe_file: Path) -> None:
    """One fault a run is a slow way to learn of five."""
    text = faults(recipe_file, "student.lora.r=0", "data.answer=no", "training.max_step=1")
    assert text.splitlines()[0].endswith("has 2 faults:")  # types first, combinations once the types are right
    text = faults(recipe_file, "training.max_step=1", "loss.terms.0.kind=kl", "data.student_shots=[9]")
    assert text.splitlines()[0].endswith("has 3 faults:")


def test_secrets_stay_out_of_messages(recipe_file: Path) -> None:
    """Messages end up in logs and bug reports."""
    text = faults(recipe_file, "student.tokne=hf_abcdefghijklmnopqrstuvwxyz", "training.max_steps=hf_abcdefghijklmnop")
    assert "hf_abc" not in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("student: {model: a", "it is no valid YAML"),
        ("student: {model: a}\nstudent: {model: b}\n", "the key 'student' is given twice"),
        ("- a\n- b\n", "expected sections such as student:, teacher: and data:"),
        ("", "it holds None; expected sections"),
    ],
)
def test_broken_files(tmp_path: Path, content: str, words: str) -> None:
    """YAML takes the last of two equal keys in silence, so half of a recipe could be dead text."""
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    assert words in faults(path)


def test_a_missing_file_names_its_neighbours(recipe_file: Path) -> None:
    """A wrong path is the most common slip of all."""
    assert f"there is no such file; did you mean {recipe_file}?" in faults(recipe_file.with_name("bass.yaml"))


def test_paths_are_found_beside_the_recipe(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe with data beside it must run from any folder; what is typed is meant from where it is typed."""
    folder = recipe_file.parent
    (folder / "verbs.jsonl").touch()
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_recipe(recipe_file).data.train.path == str(folder / "verbs.jsonl")
    (elsewhere / "verbs.jsonl").touch()
    assert load_recipe(recipe_file).data.train.path == str(folder / "verbs.jsonl")
    assert load_recipe(recipe_file, ["data.train.path=verbs.jsonl"]).data.train.path == "verbs.jsonl"
    assert load_recipe(recipe_file, ["data.train.path=org/hub_id"]).data.train.path == "org/hub_id"
    monkeypatch.chdir(folder)
    assert load_recipe(recipe_file).data.train.path == "verbs.jsonl"
