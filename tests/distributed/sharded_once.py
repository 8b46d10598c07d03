"""What each of two processes runs with a sharded student: a run that is saved, evaluated and asked, one that goes on
from the middle, one that writes its own texts, and what is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from conftest import make_model, make_tokenizer
from launching import SHARDED, forget_choice, shard_on_cpu
from path_battery import losses, make_case, train_case, whole_weights
from test_trainer_terms import STATES
from training import DEMONSTRATIONS, ROWS, lora, make_trainer

from hfkd import LocalTeacher, PromptStyle
from hfkd.data import PromptBuilder
from hfkd.eval.k_shot import evaluate_k_shot
from hfkd.rollout import GenerationSettings
from hfkd.rollout.hf import HFRollout
from hfkd.teachers import EmaTeacher

SAVED = [(student, kind) for student in ("full", "lora") for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT")]
SAVING = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-3}
WRITING = {"learning_rate": 0.1, "max_steps": 3, "answer": {"student": 0.7, "teacher": 0.3}}


def sharded(**config: Any) -> dict[str, Any]:
    """Training arguments that ask for FSDP2 with more settings."""
    forget_choice()
    return {**SHARDED, "fsdp_config": {**SHARDED["fsdp_config"], **config}}


def saving(student: str, kind: str) -> dict[str, Any]:
    """The settings of a saved run; one of them with the wrappers of activation checkpointing in its weights' names."""
    wrapped = {"activation_checkpointing": True} if (student, kind) == ("lora", "FULL_STATE_DICT") else {}
    return {**SAVING, **sharded(state_dict_type=kind, **wrapped)}


def ask(trainer: Any) -> dict[str, Any]:
    """The k-shot figures of a trainer's student, asked in its own precision."""
    tokenizer = make_tokenizer()
    model = trainer.accelerator.unwrap_model(trainer.model)
    report = evaluate_k_shot(
        model, tokenizer, ROWS[:6], DEMONSTRATIONS, PromptBuilder(tokenizer, PromptStyle()), shots=(0, 3),
        max_new_tokens=5, batch_size=4,
    )  # fmt: skip
    return report.to_dict()


def write_apart(model: Any, process: int) -> list[list[int]]:
    """What the model writes behind five long prompts here, and behind none on the other process, and the other way."""
    rollout = HFRollout(make_tokenizer(), GenerationSettings(max_new_tokens=6, batch_size=2))
    prompts = [[*range(100, 140), number] for number in range(5)] if process == 0 else []
    first = rollout.generate(model, prompts)
    second = rollout.generate(model, [[9, 8, 7]] if process else [])
    return [each.ids for each in [*first, *second]]


def write_alone(trainer: Any) -> list[list[list[int]]]:
    """The same on one process, for both."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return [write_apart(model, process) for process in range(2)]


def straight(folder: Path) -> dict[str, Any]:
    """Runs that are saved in their middle and at their end."""
    results: dict[str, Any] = {}
    for student, kind in SAVED:
        trainer = make_case(
            f"{student} local 1",
            folder / f"{student}-{kind}",
            2,
            **saving(student, kind),
        )
        name = f"{student} {kind}"
        results[name] = train_case(trainer)
        results[name]["eval"] = trainer.evaluate(trainer.train_dataset)["eval_loss"]
        results[name]["k_shot"] = ask(trainer)
        with trainer._student() as model:
            results[name]["written"] = write_apart(model, PartialState().process_index)
        trainer.save_model(str(folder / f"{student}-{kind}" / "final"))
    return results


def resumed(folder: Path) -> dict[str, Any]:
    """The same runs from their middle."""
    results = {}
    for student, kind in SAVED:
        home = folder / f"{student}-{kind}"
        trainer = make_case(f"{student} local 1", home, 2, **saving(student, kind))
        trainer.train(resume_from_checkpoint=str(home / "run" / "checkpoint-3"))
        results[f"{student} {kind}"] = {"after": whole_weights(trainer.model), "losses": losses(trainer)}
    return results


def variants(folder: Path) -> dict[str, Any]:
    """Other ways to train: texts written on the way, activations computed anew, half precision."""
    cases = {
        "checkpointed full": ("full local 1", {}, {"activation_checkpointing": True}),
        "bf16": ("full local 1", {"bf16": True}, {}),
        "written full": ("full local 1", WRITING, {}),
        "written lora": ("lora self 4", WRITING, {}),
        "written checkpointed": ("lora self 1", WRITING, {"activation_checkpointing": True}),
    }
    results = {}
    for name, (case, settings, config) in cases.items():
        trainer = make_case(case, folder / "variants", 2, **sharded(**config), **settings)
        results[name] = train_case(trainer)
    return results


def refused(folder: Path) -> dict[str, str]:
    """What is said of parts that can't work in shards."""
    cases: dict[str, dict[str, Any]] = {
        "moving": {"teacher": EmaTeacher(0.9)},
        "projections": {"teacher": LocalTeacher(make_model(seed=1, hidden_size=48)), "objective": STATES},
        "norms": {"log_gradient_norms": True},
        "shards": sharded(activation_checkpointing=True, state_dict_type="SHARDED_STATE_DICT"),
        "empty": sharded(cpu_ram_efficient_loading=True),
        "early": {"evaluated": True},
        "tied": {"peft_config": lora(modules_to_save=["lm_head"])},
    }
    said = {}
    for name, changes in cases.items():
        early = changes.pop("evaluated", False)
        try:
            trainer = make_trainer(folder / "refused", **{"ddp_backend": "gloo", **sharded(), **changes})
            if early:
                trainer.evaluate(trainer.train_dataset)
            said[name] = ""
        except ValueError as error:
            said[name] = str(error)
    return said


def main(folder: Path, jobs: list[str]) -> None:
    """Do the jobs one after the other and save what came out."""
    shard_on_cpu()
    known: dict[str, Callable[[Path], Any]] = {
        "straight": straight, "resumed": resumed, "variants": variants, "refused": refused
    }  # fmt: skip
    for job in jobs:
        torch.save(known[job](folder), folder / f"{job}-{PartialState().process_index}.pt")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
