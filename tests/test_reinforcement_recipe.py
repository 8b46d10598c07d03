"""Recipes with a reward: what is read, what is refused, and a run from the first question to the last file."""

from __future__ import annotations

import math
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_model, make_tokenizer
from training import WORDS

from hfkd.recipe import Recipe, RecipeError, load_recipe
from hfkd.recipe.reinforcement import ReinforcementSection
from hfkd.reinforcement.config import KINDS, POLICY_LOSSES, KDRLConfig
from hfkd.reinforcement.masks import PLACES
from hfkd.run import run_recipe
from hfkd.run.build import build, settings_of
from hfkd.run.reinforce import full_objective, make_reward_config

BASE = {
    "student": {"model": "org/small", "lora": {"r": 4}},
    "teacher": {"kind": "self"},
    "data": {
        "train": {"path": "words.jsonl"},
        "demonstrations": {"count": 4},
        "answer": "student",
        "generation": {"temperature": 1.0, "max_new_tokens": 6},
        "max_length": 256,
    },
    "reinforcement": {"verifier": "exact", "num_generations": 4},
    "training": {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True, "logging_steps": 1},
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reinforcement.verifier=exactly", "there is no verifier 'exactly'"),
        ("reinforcement.estimator=k1", "reinforcement.estimator"),
        ("reinforcement.distillation_weight=-1", "reinforcement.distillation_weight"),
        (
            "reinforcement.distillation_weight={schedule: step, start: 1, end: 0}",
            "the step comes at the end of the run",
        ),
        ("reinforcement={verifier: exact, distillation_weight: 0, reward_weight: 0}", "nothing would be learned"),
        ("reinforcement.options={temperature: 2}", "is set by data.generation.temperature"),
        ("reinforcement.options={learning_rate: 2}", "give it as training.learning_rate"),
        ("reinforcement.options={num_iterations: 2}", "is a key of its own"),
        ("reinforcement.options={epsilonn: 2}", "did you mean"),
        ("data.answer=dataset", "set answer: student"),
        ("data.generation.temperature=0", "none better than another"),
        ("data.prompt.stop=['ab']", "a rewarded answer ends at tokens"),
        ("teacher.kind=none", "is above 0, and teacher.kind is none"),
        ("training.eval_strategy=steps", "isn't evaluated while it trains"),
        ("loss={terms: [{kind: forward_kl}]}", "estimates the reverse KL and no other terms"),
        ("training.padding_free=true", "isn't read by a rewarded run"),
        ("training.log_agreement=true", "isn't read by a rewarded run"),
        ("training.log_gradient_norms=true", "isn't read by a rewarded run"),
    ],
)
def test_what_cant_work_is_found_when_the_recipe_is_read(recipe_file, override, message):
    """Each of these would otherwise be found after the models were loaded, or never."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reinforcement.num_generations=3", "a step has 8 answers"),
        ("reinforcement.options={generation_batch_size: 7}", "generation_batch_size"),
        ("reinforcement.options={reward_weights: [3, 2]}", "there is one verifier"),
        ("reinforcement.options={loss_type: foo}", "loss_type is 'foo'"),
        ("reinforcement.options={epsilon: -1}", "epsilon is -1"),
        ("reinforcement.options={top_entropy_quantile: 5}", "from 0 to 1"),
        ("reinforcement={verifier: exact, num_generations: 4, policy_loss: nft, options: {beta: 0.1}}", "nft doesn't"),
        ("training.label_smoothing_factor=0.1", "label_smoothing_factor"),
    ],
)
def test_settings_of_a_reward_are_checked_when_a_run_is_built(recipe_file, override, message):
    """Each of these would otherwise be told after the student was loaded and asked, in the first step, or never."""
    recipe = load_recipe(recipe_file, [override])
    with pytest.raises(RecipeError) as caught:
        build(recipe, dry=True)
    assert message in str(caught.value)


def test_a_rewarded_run_is_evaluated_whatever_its_steps_were(recipe_file):
    """Training alone needs whole groups; the recipe of a run by two processes is evaluated by one."""
    recipe = load_recipe(recipe_file, ["training.per_device_train_batch_size=2"])
    with pytest.raises(RecipeError, match="a step has 2 answers"):
        settings_of(recipe)
    assert settings_of(recipe, trains=False).recipe is recipe


@pytest.mark.parametrize(
    ("overrides", "temperature", "chunk_size"),
    [
        ([], 0.5, None),
        (["loss={terms: [{kind: reverse_kl}], chunk_size: 64}"], 0.5, 64),
        (["loss={terms: [{kind: reverse_kl, temperature: 2.0}], chunk_size: 64}"], 2.0, 64),
    ],
)
def test_the_full_term_is_measured_where_the_answers_are_drawn(recipe_file, overrides, temperature, chunk_size):
    """k2 and full would estimate different divergences in one table."""
    settings = ["reinforcement.estimator=full", "data.generation.temperature=0.5"]
    recipe = load_recipe(recipe_file, [*overrides, *settings])
    for one in (recipe, Recipe.model_validate(recipe.resolved())):
        objective = full_objective(build(one, dry=True))
        (term,) = objective.terms
        assert term.loss.temperature == temperature and objective.chunk_size == chunk_size


def test_a_resolved_recipe_is_a_recipe(recipe_file):
    """The recipe that lies beside a run must run as it stands, and mean the same."""
    resolved = load_recipe(recipe_file).resolved()
    assert [term["kind"] for term in resolved["loss"]["terms"]] == ["reverse_kl"]
    recipe_file.write_text(yaml.safe_dump(resolved))
    assert load_recipe(recipe_file).resolved() == resolved


def test_the_section_says_what_the_settings_do(recipe_file):
    """A name that one of the two doesn't know, or another default, is found by nobody until somebody uses it."""
    fields = ReinforcementSection.model_fields
    for name, known in (("estimator", KINDS), ("policy_loss", POLICY_LOSSES), ("distil_where", PLACES)):
        assert typing.get_args(fields[name].annotation) == tuple(known)
    config = KDRLConfig(output_dir="unused", use_cpu=True)
    for name, value in ReinforcementSection(verifier="exact").settings().items():
        assert getattr(config, name) == value


def test_settings_of_a_recipe_reach_the_trainer(recipe_file):
    """TRL has other defaults (bfloat16, checkpointing, the learning rate), and a recipe without them means ours."""
    recipe = load_recipe(recipe_file, ["reinforcement.options={epsilon: 0.1}", "training.learning_rate=0.001"])
    config = make_reward_config(recipe, build(recipe, dry=True).config)
    assert (config.epsilon, config.learning_rate, config.max_completion_length) == (0.1, 0.001, 6)
    assert (config.bf16, config.gradient_checkpointing, config.max_length) == (False, False, 256)
    default = make_reward_config(load_recipe(recipe_file), build(load_recipe(recipe_file), dry=True).config)
    assert default.learning_rate == build(load_recipe(recipe_file), dry=True).config.learning_rate


def begins_with_a_vowel(row: Any, text: str) -> float:
    """A verifier of a user's own."""
    return float(text.strip()[:1] in "aeiou")


def local(tmp_path: Path, recipe_file: Path, **sections: Any) -> Path:
    """The recipe with a tiny student and its words beside it."""
    make_model(seed=0).save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    lines = "".join(f'{{"prompt": "{word}", "completion": "{word}ed"}}\n' for word in WORDS)
    (tmp_path / "words.jsonl").write_text(lines)
    changed = {**BASE, **sections, "student": {"model": str(tmp_path / "student"), "lora": {"r": 4}}}
    changed["training"] = {**BASE["training"], "output_dir": str(tmp_path / "run"), "learning_rate": 0.01}
    changed["evaluation"] = {"size": 4, "shots": [0, 1], "max_new_tokens": 4, "gold_baseline": True}
    recipe_file.write_text(yaml.safe_dump(changed))
    return recipe_file


@pytest.mark.parametrize("teacher", ["self", "none"])
def test_a_rewarded_run_from_end_to_end(tmp_path, recipe_file, teacher):
    """Trainer, record, report and card each know of distillation runs; one that stumbles loses a finished training."""
    reward = {"verifier": "test_reinforcement_recipe:begins_with_a_vowel", "num_generations": 4}
    reward |= {"distillation_weight": 0} if teacher == "none" else {"estimator": "full", "distillation_weight": 0.5}
    path = local(tmp_path, recipe_file, reinforcement=reward, teacher={"kind": teacher})
    result = run_recipe(load_recipe(path))
    assert result.record.status == "finished" and math.isfinite(result.record.metrics["train_loss"])
    names = {found.name for found in (tmp_path / "run").iterdir()}
    assert {"adapter_model.safetensors", "run.json", "report.json", "README.md"} <= names
    assert "This model is a fine-tuned version" not in (tmp_path / "run" / "README.md").read_text()  # TRL's card
    assert "training_args.bin" not in names
