"""A training run small enough for every test, and the comparison of two of them. Shared by test_trainer.py and the
two-process scripts.
"""

from __future__ import annotations

from typing import Any

import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig

from hfkd import DistillationConfig, DistillationTrainer, PromptStyle, SelfTeacher

WORDS = "walk jump sing ring bake play open close paint move start carry talk dance laugh cook wash".split()
ROWS = [{"prompt": word, "completion": word + "ed" * (1 + place % 3)} for place, word in enumerate(WORDS)]
DEMONSTRATIONS = [{"prompt": f"verb{place}", "completion": f"verb{place}ed"} for place in range(4)]


def lora(**overrides: Any) -> LoraConfig:
    """An adapter on every linear layer whose B is not zero, so that it changes the model from the first step on."""
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**{**settings, **overrides})


def make_trainer(
    folder: Any, *, model: Any = None, teacher: Any = "self", rows: list[dict] = ROWS[:16], **overrides: Any
) -> DistillationTrainer:
    """A self-distillation trainer on sixteen words, float32, SGD (its update is proportional to the gradient), two
    steps of eight.
    """
    names = (
        "objective",
        "peft_config",
        "data_collator",
        "demonstrations",
        "student_shots",
        "eval_dataset",
        "callbacks",
        "prompts",
        "token_weights",
        *("answer", "rollout", "buffer", "sampler", "revisers"),
    )
    parts = {name: overrides.pop(name) for name in names if name in overrides}
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    torch.manual_seed(5)  # the adapter's random weights
    if teacher == "self":
        teacher = SelfTeacher("adapter_off")
        parts.setdefault("peft_config", lora())
    return DistillationTrainer(
        make_model(seed=0) if model is None else model,
        teacher,
        parts.pop("objective", "forward_kl"),
        DistillationConfig(output_dir=str(folder), **{**settings, **overrides}),
        train_dataset=rows,
        processing_class=make_tokenizer(),
        prompts=parts.pop("prompts", PromptStyle()),
        demonstrations=parts.pop("demonstrations", DEMONSTRATIONS),
        **parts,
    )


def trained_weights(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    """Copies of the parameters that learn, by name."""
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def run(folder: Any, **overrides: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train; returns the update of every parameter that learns and the loss of each step."""
    trainer = make_trainer(folder, **overrides)
    before = trained_weights(trainer)
    trainer.train()
    update = {name: value - before[name] for name, value in trained_weights(trainer).items()}
    assert update and all(float(value.abs().max()) > 0 for value in update.values()), "a parameter didn't move"
    return update, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def worst_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest norm of a difference of two updates, relative to the norm of the first."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).norm() / first[name].norm()) for name in first)
