"""Steps of a rewarded training: over old answers, over several micro-batches, resumed between two of them, and with
what student, teacher and verifier read in each.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import get_peft_model
from rewarding import (
    SETTINGS,
    assert_step,
    learned,
    listen,
    logged,
    make_rewarded,
    odd,
    picked,
    same,
    student,
    trained,
)
from training import DEMONSTRATIONS, ROWS, lora

from hfkd import PromptStyle
from hfkd.errors import CheckpointError
from hfkd.reinforcement import KDRLConfig, KDRLTrainer
from hfkd.reinforcement.asking import log_probs_of, stop_ids
from hfkd.reinforcement.nft import nft_loss

TOLD = {"demonstrations": DEMONSTRATIONS, "prompts": PromptStyle()}


@pytest.mark.parametrize(
    "batches",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
    ],
)
def test_the_term_and_its_figure_are_means_over_the_step(tmp_path, batches):
    """A mean of means, or one over a whole generation, weighs a token by how many others are wrong beside it."""
    options = {"teacher": make_model(seed=1), "reward_weight": 0.0, "distillation_weight": 1.0}
    trainer = make_rewarded(tmp_path, distil_where="wrong_responses", **options, **batches)
    shares: list[float] = []
    compute = trainer._distillation
    trainer._distillation = lambda model, inputs, said: (
        shares.append(float(inputs["taught"].float().mean())),
        compute(model, inputs, said),
    )[1]
    trainer.train()
    losses, terms = logged(trainer, "loss"), logged(trainer, "distillation/loss")
    assert len(set(shares)) > 1 and len(terms) == 2
    assert losses == pytest.approx(terms, rel=2e-3) and min(terms) > 0.1


@pytest.mark.parametrize(
    ("options", "at"),
    [
        ({"num_iterations": 2}, 1),
        ({"num_iterations": 2}, 3),
        ({"per_device_train_batch_size": 4, "steps_per_generation": 2, "estimator": "k3", "beta": 0.1}, 1),
    ],
)
def test_a_run_goes_on_exactly_inside_a_generation(tmp_path, options, at):
    """Other answers would be drawn for the steps that are left, and all later ones at the wrong steps."""
    options = {"teacher": "self", "distillation_weight": 0.5, "max_steps": 4, **options, **TOLD}
    straight = trained(make_rewarded(tmp_path / "straight", save_strategy="steps", save_steps=1, **options))
    trainer, checkpoint = make_rewarded(tmp_path / "resumed", **options), tmp_path / "straight" / f"checkpoint-{at}"
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert same(straight, learned(trainer))
    if at == 3:
        other = make_rewarded(tmp_path / "other", **{**options, "num_iterations": 3})
        with pytest.raises(CheckpointError, match="num_iterations 2"):
            other.train(resume_from_checkpoint=str(checkpoint))


def test_nft_learns_from_old_answers_by_their_ratio(tmp_path, monkeypatch):
    """Without the weights that drew, the second step over the same answers would be the first one once more."""
    options = {"policy_loss": "nft", "distillation_weight": 0, "max_grad_norm": 0.0, "num_iterations": 2}
    once = trained(make_rewarded(tmp_path / "once", max_steps=1, **options))
    trainer = make_rewarded(tmp_path / "twice", max_steps=2, **options)
    kept = listen(trainer, monkeypatch)
    after, inputs = trained(trainer), kept[1]
    reference = student()
    with torch.no_grad():
        drawn = picked(reference, trainer, inputs)
        for name, value in reference.named_parameters():
            if value.requires_grad:
                value.copy_(once[name])
    ratio, mask = picked(reference, trainer, inputs) - drawn, inputs["completion_mask"]
    assert ratio[mask.bool()].abs().max() > 1e-3
    assert min(logged(trainer, "entropy")) > 0.1
    loss = (nft_loss(ratio, inputs["rewards"], inputs["success"]) * mask).sum() / mask.sum()
    loss.backward()
    assert_step(reference, once, after, SETTINGS["learning_rate"])


@pytest.mark.parametrize("policy_loss", ["nft", "grpo"])
def test_what_another_engine_drew_counts_by_its_ratio(tmp_path, policy_loss):
    """vLLM's probabilities aren't the trainer's: a term without the ratio learns from another distribution."""
    teaches = {"teacher": make_model(seed=1), "distillation_weight": 1.0, "reward_weight": 0.0}
    options = {"distillation_weight": 0, "policy_loss": "nft"} if policy_loss == "nft" else teaches
    moved = []
    for ratio in (None, 0.25):
        trainer = make_rewarded(tmp_path / str(ratio), max_steps=1, max_grad_norm=0.0, **options)
        score = trainer._generate_and_score_completions

        def with_ratio(inputs, score=score, ratio=ratio):
            output = score(inputs)
            drift = {"importance_sampling_ratio": torch.full((len(inputs), 1), ratio)} if ratio else {}
            return {**output, **drift}

        trainer._generate_and_score_completions = with_ratio
        before = learned(trainer)
        after = trained(trainer)
        moved.append({name: after[name] - before[name] for name in after})
    whole, part = moved
    assert all(torch.allclose(part[name], 0.25 * whole[name], rtol=1e-3, atol=1e-6) for name in whole)


def test_vllm_is_told_where_answers_end(tmp_path):
    """It would write on behind the line end, and the questions it invents would be judged and learned."""
    args = KDRLConfig(str(tmp_path), **{**SETTINGS, "use_vllm": True, "distillation_weight": 0})
    with pytest.raises(Exception, match="(?i)vllm"):
        KDRLTrainer(
            student(),
            None,
            odd,
            args,
            train_dataset=ROWS[:16],
            processing_class=make_tokenizer(),
            prompts=PromptStyle(stop=("e",)),
        )
    assert args.generation_kwargs["stop_token_ids"] == stop_ids(make_tokenizer(), ["e"])


def test_the_students_dropout_doesnt_reach_its_teacher(tmp_path, monkeypatch):
    """A self-teacher shares the student's modules: one that drops some of them says something else each time."""
    model = get_peft_model(make_model(seed=0, attention_dropout=0.5), lora(lora_dropout=0.5))
    options = {
        "teacher": "self",
        "distillation_weight": 1.0,
        "reward_weight": 0.0,
        "max_steps": 1,
        "num_iterations": 1,
    }
    trainer = make_rewarded(tmp_path, model=model, **options)
    said, speak = [], trainer.teacher.signal

    def twice(batch, needs):
        found = [speak(batch, needs) for _ in range(2)]
        said.extend(log_probs_of(one.rows, batch.teacher_view.targets, 1.0, 384) for one in found)
        return found[0]

    monkeypatch.setattr(trainer.teacher, "signal", twice)
    trainer.train()
    assert torch.equal(said[0], said[1])


def test_demonstrations_are_drawn_anew_at_each_pass(tmp_path, monkeypatch):
    """A student that meets a question behind the same examples each time learns them by heart."""
    options = {"distillation_weight": 0, "max_steps": 4, "train_dataset": ROWS[:4], "student_shots": (1,), **TOLD}
    trainer = make_rewarded(tmp_path, **options)
    kept = listen(trainer, monkeypatch)
    trainer.train()
    read: dict[int, set] = {}
    for inputs in kept:
        for place, ids, mask in zip(inputs["asked"], inputs["prompt_ids"], inputs["prompt_mask"], strict=True):
            read.setdefault(int(place), set()).add(tuple(ids[mask.bool()].tolist()))
    assert len(read) == 4 and any(len(prompts) == 2 for prompts in read.values())


def test_the_verifier_reads_what_an_evaluation_reads(tmp_path):
    """A right answer that ends as it was taught would be wrong for the stop string in its last token."""
    texts: list[str] = []

    def verifier(row: Any, text: str) -> float:
        texts.append(text)
        return odd(row, text)

    options = {"distillation_weight": 0, "max_steps": 1, "prompts": PromptStyle(stop=("e",))}
    trainer = make_rewarded(tmp_path, verifier=verifier, **options)
    trainer.train()
    assert texts and not any("e" in text for text in texts)
    assert any("e" in text for text in trainer._logs["completion"])
    texts.clear()
    trainer.reward(["5e and more", " 6", "7"], [0, 1, 2])
    assert texts == ["5", " 6", "7"]
