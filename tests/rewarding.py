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
PARTS = ("teacher", "demonstrations", "prompts", "verifier", "objective", "student_shots", "train_dataset")


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


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(first[name], second[name]) for name in first)


def listen(trainer: KDRLTrainer, monkeypatch: Any) -> list[dict]:
    """What the trainer will learn from, batch by batch."""
    kept: list[dict] = []
    original = trainer._compute_loss
    monkeypatch.setattr(
        trainer, "_compute_loss", lambda model, inputs: (kept.append(inputs), original(model, inputs))[1]
    )
    return kept


def distributions(model: Any, prompts: list[list[int]], inputs: dict) -> torch.Tensor:
    """[B, T, V] log-probabilities of each answer's tokens behind prompts of any length, row by row."""
    rows = []
    for prompt, answer in zip(prompts, inputs["completion_ids"], strict=True):
        logits = model(torch.tensor([[*prompt, *answer.tolist()]])).logits[0]
        rows.append(logits[len(prompt) - 1 : -1].log_softmax(dim=-1))
    return torch.stack(rows)


def prompts_of(trainer: KDRLTrainer, inputs: dict, side: str) -> list[list[int]]:
    """What one side read before each answer."""
    all_of_them = trainer.views.student_prompts if side == "student" else trainer.views.teacher_prompts
    return [all_of_them[int(place)] for place in inputs["asked"]]


def picked(model: Any, trainer: KDRLTrainer, inputs: dict) -> torch.Tensor:
    """[B, T] log-probabilities of the drawn tokens."""
    rows = distributions(model, prompts_of(trainer, inputs, "student"), inputs)
    return rows.gather(-1, inputs["completion_ids"][..., None])[..., 0]


def assert_step(reference: Any, before: dict, after: dict, rate: float) -> None:
    """One step of SGD by the reference's gradients leads from the one to the other."""
    looked = 0
    for name, value in reference.named_parameters():
        if value.requires_grad and value.grad.abs().max() > 1e-6:
            update, looked = (after[name] - before[name]) / -rate, looked + 1
            most = float(value.grad.abs().max())
            assert torch.allclose(update, value.grad, rtol=2e-3, atol=2e-5 * most + 1e-6), name
    assert looked
