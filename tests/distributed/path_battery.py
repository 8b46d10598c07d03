"""The battery's cases: student, teacher and accumulation, each trained for five steps of eight rows. Shared by the
tests and the scripts that two processes run.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch
from conftest import make_model, make_tokenizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from training import ROWS, lora, make_trainer

from hfkd import DistillationTrainer, LocalTeacher, SelfTeacher
from hfkd.data.collate import DistillationCollator
from hfkd.teachers import RoutedTeacher
from hfkd.teachers.cached import CachedTeacher

STEPS, ROWS_A_STEP = 5, 8
# One row in five is the frozen copy's, so that a process often has none for it, the first of the members.
ROUTED = [{**row, "teacher": "self" if place % 5 == 0 else "one"} for place, row in enumerate(ROWS[:16])]

GRID = [f"{student} {teacher} {times}" for student, teacher, times in product(
    ("full", "lora"), ("local", "self", "cached"), (1, 4)
)]  # fmt: skip
MORE = ["full live 1", "full local 1 adamw", "full local 1 untied", "full local 1 clipped", "lora local 1 fewer",
        "lora self 1 mixed", "full routed 1", "lora local 1 untied head", "lora local 4 untied ends"]  # fmt: skip
CASES = GRID + MORE


def make_case(case: str, folder: Path, processes: int, **overrides: Any) -> DistillationTrainer:
    """The trainer of a case.

    Args:
        case: One of `CASES`.
        folder: Holds the cache, and takes what the trainer writes.
        processes: Among which the rows of a step are divided.
        **overrides: Of the training arguments.
    """
    student, teacher, times, *more = case.split()
    shape = {"tie_word_embeddings": "untied" not in more}
    full = student == "full"
    teachers = {
        "local": lambda: LocalTeacher(make_model(seed=1, **shape)),
        "self": lambda: SelfTeacher("frozen_copy" if full else "adapter_off"),
        "live": lambda: SelfTeacher("live"),
        "routed": lambda: RoutedTeacher({"self": SelfTeacher("frozen_copy"), "one": LocalTeacher(make_model(seed=1))}),
        "cached": lambda: CachedTeacher(folder / "cache"),
    }
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS_A_STEP // int(times) // processes,
        "gradient_accumulation_steps": int(times),
        "learning_rate": 0.3,
        "ddp_backend": "gloo" if processes > 1 else None,
    }
    if "adamw" in more:
        settings |= {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.01}
    if "clipped" in more:
        settings["max_grad_norm"] = 0.05
    if not full:
        settings["peft_config"] = adapter(more)
    if teacher == "routed":
        settings["rows"] = ROUTED
    model = make_model(seed=0, **shape)
    trainer = make_trainer(folder / "run", model=model, teacher=teachers[teacher](), **{**settings, **overrides})
    if "mixed" in more:
        trainer.data_collator = collate_with_one_stray
    return trainer


def adapter(more: list[str]) -> Any:
    """The adapter of a case: on every layer, or on some, perhaps with ends of the model that learn whole."""
    if "fewer" in more:
        return lora(target_modules=["q_proj", "down_proj"])
    whole = {"head": ["lm_head"], "ends": ["lm_head", "embed_tokens"]}
    saved = next((whole[word] for word in more if word in whole), None)
    return lora() if saved is None else lora(target_modules=["q_proj"], modules_to_save=saved)


def collate_with_one_stray(features: list[Any]) -> dict[str, Tensor]:
    """The rows, of which one of the sixteen has a teacher's prompt that doesn't begin with the shared prefix."""
    inputs, stray = DistillationCollator(2)(features), make_tokenizer()(" " + ROWS[0]["prompt"])["input_ids"]
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        if ids[2 : 2 + len(stray)] == stray:
            first = int(inputs["teacher_attention_mask"][row].long().argmax())
            inputs["teacher_input_ids"][row, first] = 7
    return inputs


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that learn, gathered, by name; all processes take part."""
    weights = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            value = value.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value.clone()
            weights[name.replace("_checkpoint_wrapped_module.", "").removeprefix("module.")] = value
    return weights


def share_here(model: nn.Module) -> float:
    """The share of a model's weights, counted in numbers, that lies in this process."""
    here = sum((one.to_local() if isinstance(one, DTensor) else one).numel() for one in model.parameters())
    return here / sum(one.numel() for one in model.parameters())


def losses(trainer: DistillationTrainer) -> list[float]:
    """The loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_case(trainer: DistillationTrainer) -> dict[str, Any]:
    """Train; what came out, with the weights whole."""
    before = whole_weights(trainer.model)
    trainer.train()
    after = whole_weights(trainer.model)
    return {"losses": losses(trainer), "before": before, "after": after}


def worst_gap(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest norm of a difference of two sets of weights, relative to the norm of the first."""
    assert first.keys() == second.keys()
    return max(float(torch.dist(first[name], second[name]) / first[name].norm()) for name in first)


def updates(result: dict[str, Any]) -> dict[str, Tensor]:
    """What training added to each parameter."""
    return {name: after - result["before"][name] for name, after in result["after"].items()}
