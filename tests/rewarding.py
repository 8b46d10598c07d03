"""A rewarded training small enough for every test; shared with the two-process script."""

from __future__ import annotations

from typing import Any

import torch
from conftest import make_model, make_tokenizer
from peft import get_peft_model
from training import ROWS, lora

from hfkd.reinforcement import KDRLConfig, KDRLTrainer

SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "learning_rate": 0.05,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "seed": 3,
}
PARTS = ("teacher", "demonstrations", "prompts", "verifier", "objective", "train_dataset")


def odd(row: Any, text: str) -> float:
    """A verifier that a random model satisfies now and then."""
    return float(len(text) % 2)


def student() -> torch.nn.Module:
    """A tiny model with an adapter that isn't zero, always the same."""
    torch.manual_seed(5)
    return get_peft_model(make_model(seed=0), lora())


def make_rewarded(folder: Any, **overrides: Any) -> KDRLTrainer:
    """Two steps of eight answers, four to each prompt."""
    parts = {name: overrides.pop(name) for name in PARTS if name in overrides}
    rows = parts.pop("train_dataset", ROWS[:16])
    model = overrides.pop("model", None) or student()
    return KDRLTrainer(
        model,
        parts.pop("teacher", None),
        parts.pop("verifier", odd),
        KDRLConfig(output_dir=str(folder), **{**SETTINGS, **overrides}),
        train_dataset=rows,
        processing_class=make_tokenizer(),
        **parts,
    )


def learned(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of what learns, by name."""
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    """Train; the weights after it, which must have moved."""
    before = learned(trainer)
    trainer.train()
    after = learned(trainer)
    assert any(not torch.equal(before[name], after[name]) for name in before), "nothing moved"
    return after


def logged(trainer: Any, name: str) -> list[float]:
    """A figure of each step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
