"""A run that is gone on from a checkpoint is the run that was never stopped, to the last bit; and what isn't that run
is refused.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from torch import nn
from training import ROWS, lora, make_trainer, trained_weights

from hfkd import DistillationTrainer, EmaTeacher, GenerationSettings, HFRollout, LocalTeacher, OffPolicyBuffer
from hfkd.checkpoint import FORMAT, MANIFEST
from hfkd.errors import CheckpointError
from hfkd.losses import Divergence
from hfkd.objective import Objective, Term
from hfkd.rollout.watch import Watch

COMMON = {
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 4,
    "max_steps": 8,
    "optim": "adamw_torch",
}
"""Four steps an epoch, so that step 4 ends one and step 6 is inside one."""


class Leaning(Divergence):
    """Forward KL with a learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))

    def between(self, student, teacher):
        """Scaled."""
        return self.factor * (teacher.exp() * (teacher - student)).sum(-1)


def adapter(**more: Any) -> dict[str, Any]:
    return {"peft_config": lora(lora_dropout=0.3), "learning_rate": 1e-2, **more}


def whole_student(**more: Any) -> dict[str, Any]:
    model = make_model(seed=0, attention_dropout=0.2)
    return {"model": model, "teacher": LocalTeacher(make_model(seed=1)), "learning_rate": 1e-3, **more}


def written() -> dict[str, Any]:
    rollout = HFRollout(make_tokenizer(), GenerationSettings(max_new_tokens=4, temperature=1.0, stop=("\n",)))
    return adapter(answer={"student": 0.8, "dataset": 0.2}, rollout=rollout, buffer=OffPolicyBuffer(24, 0.5))


CASES = {
    "adapter with dropout": adapter,
    "full student": whole_student,
    "accumulation": lambda: adapter(gradient_accumulation_steps=4, per_device_train_batch_size=1),
    "average of the student": lambda: {**adapter(), "teacher": EmaTeacher(decay=0.5)},
    "a loss that learns": lambda: whole_student(objective=Objective([Term("leaning", Leaning())])),
    "demonstrations drawn anew": lambda: adapter(student_shots=(0, 2)),
    "texts of its own": written,
    "cosine, workers": lambda: adapter(lr_scheduler_type="cosine", warmup_steps=2, dataloader_num_workers=1),
    "evaluation after each epoch": lambda: adapter(eval_dataset=ROWS[:4], eval_strategy="epoch"),
}


def state_of(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    """All that a step changes: what learns, the optimizer, the losses, the teacher, the texts."""
    state = dict(trained_weights(trainer))
    for place, entry in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{place}.{name}": value for name, value in entry.items()}
    for name, owner in (("objective", trainer.objective), ("teacher", trainer.teacher), ("writer", trainer.writer)):
        state |= {f"{name}.{key}": value for key, value in (owner.state_dict() if owner is not None else {}).items()}
    state["random"] = torch.get_rng_state()
    return state


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs that were never stopped, by case, each made once."""
    made: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}

    def of(name: str) -> tuple[Path, dict[str, torch.Tensor]]:
        if name not in made:
            folder = tmp_path_factory.mktemp("straight")
            trainer = make_trainer(folder, **{**COMMON, **CASES[name]()})
            before = trained_weights(trainer)
            trainer.train()
            after = trained_weights(trainer)
            assert all(not torch.equal(before[key], after[key]) for key in before), "a parameter didn't move"
            made[name] = folder, state_of(trainer)
        return made[name]

    return of


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize("name", CASES)
def test_resumed_is_straight_to_the_last_bit(tmp_path: Path, straight: Any, name: str, step: int) -> None:
    """Whatever isn't in a checkpoint, or is drawn from where nobody puts it back, makes another run of it."""
    folder, wanted = straight(name)
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    torch.manual_seed(99)
    trainer = make_trainer(tmp_path, **{**COMMON, **CASES[name]()})
    trainer.train(resume_from_checkpoint=True)
    found = state_of(trainer)
    assert trainer.state.global_step == 8 and found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(wanted[key], found[key])] == []
