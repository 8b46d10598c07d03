"""Training on texts that are written on the way: the same update whatever the batches, and the right terms."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from conftest import make_model, make_tokenizer
from test_writer import always, ending_in
from training import ROWS, lora, trained_weights, worst_difference

from hfkd import DistillationTrainer, SelfTeacher
from hfkd.errors import NothingToLearn
from hfkd.recipe import load_recipe
from hfkd.rollout import Completion, GenerationSettings, HFRollout, OffPolicyBuffer
from hfkd.run.build import build

# Cases that one process and two must train alike; made anew for each run.
WRITTEN = {
    "scripted": lambda: {"answer": "student", "rollout": ending_in()},
    "sampled": lambda: {
        "answer": {"student": 0.7, "dataset": 0.3},
        "rollout": HFRollout(make_tokenizer(), GenerationSettings(max_new_tokens=5, temperature=1.0, stop=("\n",))),
        "max_steps": 6,
        "seed": 17,
    },
}


def make_trainer(folder: Any, *, teacher: Any = None, **overrides: Any):
    """As in training.py, with an adapter and reverse KL; a self-teacher that reads four demonstrations."""
    settings = {"objective": "reverse_kl", "peft_config": lora(), **overrides}
    return training.make_trainer(folder, teacher=teacher or SelfTeacher("adapter_off"), **settings)


def trained(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    """Train; the update of every parameter that learns."""
    before = trained_weights(trainer)
    trainer.train()
    return {name: value - before[name] for name, value in trained_weights(trainer).items()}


def losses(trainer: DistillationTrainer, name: str = "loss") -> list[float]:
    """A figure of each step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def other_endings(rows: list[dict] = ROWS[:16]) -> list[dict]:
    """The rows with the texts that `ending_in` writes."""
    return [{**row, "completion": f"{row['prompt']}ing"} for row in rows]


@pytest.mark.parametrize("source", ["student", "teacher"])
@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_written_text_trains_as_the_same_text_in_a_data_set(tmp_path, source, size, accumulation):
    """Tokens that are counted before the texts are written, or per micro-batch, scale every step wrongly."""
    straight = make_trainer(tmp_path / "a", rows=other_endings())
    expected = trained(straight)
    rollout = ending_in()
    batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path / "b", answer=source, rollout=rollout, **batch)
    update = trained(trainer)
    assert all(float(value.norm()) > 0 for value in expected.values())
    assert worst_difference(expected, update) < 1e-5
    assert losses(trainer) == pytest.approx(losses(straight), rel=1e-5)
    assert [len(call) for call in rollout.calls] == [8, 8], "one call a step"
    assert len(set(rollout.seeds)) == 2


def test_rows_need_no_answer_where_one_is_written(tmp_path):
    """Who has questions alone must not have to make up answers; made up ones must not get into what is learned."""
    bare = [{"prompt": row["prompt"]} for row in ROWS[:16]]
    expected = trained(make_trainer(tmp_path / "a", answer="student", rollout=ending_in()))
    assert (
        worst_difference(
            expected, trained(make_trainer(tmp_path / "b", rows=bare, answer="student", rollout=ending_in()))
        )
        == 0
    )


def test_the_text_is_the_students_at_each_step(tmp_path, tokenizer):
    """A student whose texts are written before training, or by its teacher's weights, isn't on its own policy."""
    settings = GenerationSettings(max_new_tokens=6, stop=("\n",))

    class Noting(HFRollout):
        def generate(self, model, prompts, description=None):
            done = super().generate(model, prompts, description)
            seen.append((model.training, prompts, done, trained_weights(trainer)))
            return done

    for source in ("student", "teacher"):
        seen: list = []
        trainer = make_trainer(tmp_path / source, answer=source, rollout=Noting(tokenizer, settings))
        trained(trainer)
        (mode, prompts, first, before), (_, others, second, between) = seen
        model, plain = trainer.model, HFRollout(tokenizer, settings)
        assert mode is (source == "student") or source == "teacher"
        assert model.training, "the student goes on training"
        for asked, done, weights in ((prompts, first, before), (others, second, between)):
            for name, value in model.named_parameters():
                if name in weights:
                    value.data.copy_(weights[name])
            with model.disable_adapter():
                base = plain.generate(model, asked)
            own = plain.generate(model, asked)
            assert done == (own if source == "student" else base) and own != base


def test_no_cross_entropy_on_own_text(tmp_path):
    """A student that is rewarded for what it just said grows sure of it, right or wrong."""
    both = [{"kind": "reverse_kl"}, {"kind": "cross_entropy", "weight": 2.0}]
    own = make_trainer(tmp_path / "a", answer="student", rollout=ending_in(), objective=both)
    alone = make_trainer(tmp_path / "b", answer="student", rollout=ending_in())
    update = trained(own)
    assert worst_difference(update, trained(alone)) == 0
    teachers = make_trainer(tmp_path / "c", answer="teacher", rollout=ending_in(), objective=both)
    expected = trained(make_trainer(tmp_path / "d", rows=other_endings(), objective=both))
    assert worst_difference(expected, trained(teachers)) < 1e-5
    assert worst_difference(update, expected) > 0.1
    with pytest.raises(ValueError, match="learn the text"):
        make_trainer(tmp_path / "e", answer="student", rollout=ending_in(), objective="cross_entropy")


def test_a_mixture_draws_step_by_step(tmp_path):
    """Mixing within a step would break the counts; a draw per process would stop them all."""
    answer = {"student": 0.5, "dataset": 0.5}
    rollout = ending_in()
    trainer = make_trainer(tmp_path, answer=answer, rollout=rollout, max_steps=12)
    trained(trainer)
    drawn = [trainer.writer.mixture.draw(trainer.args.seed, step) == "student" for step in range(12)]
    assert 0 < sum(drawn) < 12 and len(rollout.calls) == sum(drawn)
    assert losses(trainer, "rollout/own_text") == [float(own) for own in drawn]


def test_the_log_tells_of_the_texts(tmp_path):
    """Without the figures a run whose answers are all cut or empty looks like any other."""
    trainer = make_trainer(tmp_path, answer="student", rollout=always([7] * 5, "a" * 5, finished=False))
    trained(trainer)
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["rollout/length"] == 5 and entry["rollout/cut"] == 1 and entry["rollout/empty"] == 0
    assert entry["rollout/own_text"] == 1 and entry["rollout/from_buffer"] == 0 and entry["rollout/seconds"] > 0


def test_only_empty_answers_stop_the_run(tmp_path):
    """A rollout that says nothing must not train for hours on nothing."""
    with pytest.raises(NothingToLearn, match="No token is supervised"):
        trained(make_trainer(tmp_path / "a", answer="student", rollout=always([], "", False)))
    blank = make_trainer(tmp_path / "b", answer="student", rollout=always([2], ""), max_steps=5)
    with pytest.raises(NothingToLearn, match="3 steps in a row"):
        trained(blank)
    assert blank.state.global_step == 2


def test_half_empty_answers_are_left_out_of_the_count(tmp_path):
    """Rows that learn nothing must not make the others' steps smaller."""
    silent = {f"{row['prompt']}" for row in ROWS[:16:2]}
    rollout = ending_in()
    say = rollout.answer
    tokenizer = make_tokenizer()

    def answer(prompt):
        word = tokenizer.decode(list(prompt)).rsplit("Question: ", 1)[1].split("\n")[0]
        return Completion([], "", False) if word in silent else say(prompt)

    rollout.answer = answer
    every = {"per_device_train_batch_size": 16, "max_steps": 1}
    update = trained(make_trainer(tmp_path / "a", answer="student", rollout=rollout, **every))
    spoken = [row for row in other_endings() if row["prompt"] not in silent]
    expected = trained(make_trainer(tmp_path / "b", rows=spoken, per_device_train_batch_size=8, max_steps=1))
    assert worst_difference(expected, update) < 1e-5


def test_answers_that_never_end_are_told(tmp_path, tokenizer, caplog):
    """The share of cut answers says that the limit, not the student, ends them."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    model_end = GenerationSettings(max_new_tokens=2)
    trainer = make_trainer(tmp_path, answer="student", rollout=HFRollout(tokenizer, model_end), max_steps=11)
    trainer.model.get_base_model().generation_config.eos_token_id = None
    with caplog.at_level(logging.WARNING):
        trained(trainer)
    told = [record.message for record in caplog.records if "max_new_tokens=2" in record.message]
    assert len(told) == 1 and "80 (100%)" in told[0]


def test_a_resumed_run_is_the_straight_run(tmp_path, tokenizer):
    """A run that was killed must write, draw and reuse as if nothing had happened."""
    settings = GenerationSettings(max_new_tokens=5, temperature=1.0, stop=("\n",))

    def start(folder: Path, steps: int) -> DistillationTrainer:
        return make_trainer(
            folder,
            answer={"student": 0.8, "dataset": 0.2},
            rollout=HFRollout(tokenizer, settings),
            buffer=OffPolicyBuffer(24, 0.5),
            max_steps=steps,
            save_strategy="steps",
            save_steps=4,
            learning_rate=0.05,
            seed=17,
        )

    straight = start(tmp_path / "a", 8)
    trained(straight)
    reused = losses(straight, "rollout/from_buffer")
    assert 0 < sum(reused[4:]) < 4, "want steps of both kinds behind the checkpoint"
    halved = start(tmp_path / "b", 8)
    halved.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert losses(halved)[-4:] == pytest.approx(losses(straight)[4:], rel=1e-6)
    ours, theirs = trained_weights(straight), trained_weights(halved)
    assert worst_difference(ours, theirs) < 1e-6


RECIPES = sorted((Path(__file__).parent.parent / "recipes" / "on_policy").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_are_recipes(path, tmp_path, monkeypatch):
    """A key of yesterday in a recipe is an error on its first user's screen."""
    monkeypatch.chdir(tmp_path)
    for seed, model in enumerate(("HuggingFaceTB/SmolLM2-135M-Instruct",)):
        make_model(seed=seed).save_pretrained(model)
        make_tokenizer().save_pretrained(model)
    recipe = load_recipe(str(path))
    assert recipe.data.shares.get("student"), "on-policy"
    assert (path.parent / recipe.data.train.path).is_file() or Path(recipe.data.train.path).is_file()
    assert build(recipe, dry=True).objective.terms
    assert recipe.training["output_dir"].endswith(f"on_policy_{path.stem}")
    text = path.read_text("utf-8")
    assert text.startswith("# ") and f"hfkd train recipes/on_policy/{path.name}" in text


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_recipe_for_vllm_is_a_recipe(mode, monkeypatch, tmp_path):
    """One line of the command turns the generation over to vLLM; where it runs can't be tried here."""
    monkeypatch.chdir(tmp_path)
    changes = ["data.generation.backend=vllm", f"data.generation.vllm={{mode: {mode}}}"]
    recipe = load_recipe(str(RECIPES[0].parent / "reverse_kl.yaml"), changes)
    assert recipe.data.generation.vllm == {"mode": mode}
    assert build(recipe, dry=True).objective.terms
    with pytest.raises(ValueError, match=r"data\.generation\.vllm"):
        load_recipe(str(RECIPES[0].parent / "reverse_kl.yaml"), changes[1:])
