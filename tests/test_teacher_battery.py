"""One battery for all teachers: what a user may change without changing what is learned, whoever teaches. A new
teacher is tested by a line in `KINDS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from caches import build as build_cache
from caches import make_dataset
from conftest import make_model, make_tokenizer
from training import DEMONSTRATIONS, ROWS, lora, make_trainer, run, worst_difference

from hfkd import DistillationCollator, DistillationDataset, PromptBuilder, PromptStyle
from hfkd.cache import Hidden, Sampled, TopK
from hfkd.teachers import (
    CachedTeacher,
    CrossTokenizerTeacher,
    EarlyExitTeacher,
    EmaTeacher,
    LocalTeacher,
    MixtureTeacher,
    RoutedTeacher,
    SelfTeacher,
    SnapshotTeacher,
    Teacher,
)

ROUTED = [{**row, "teacher": ("one", "two")[place % 2]} for place, row in enumerate(ROWS[:16])]


@pytest.fixture(scope="session")
def caches(tmp_path_factory) -> dict[str, Any]:
    """A cache of each codec, made once."""
    found = {}
    for name, codec in (("hidden", Hidden()), ("top_k", TopK(k=300)), ("sampled", Sampled(rounds=40))):
        found[name] = tmp_path_factory.mktemp("caches") / name
        build_cache(found[name], codec, make_dataset())
    return found


def local(seed: int = 1) -> LocalTeacher:
    return LocalTeacher(make_model(seed=seed))


KINDS: dict[str, tuple[Callable[[dict], Teacher], dict[str, Any]]] = {
    "local": (lambda caches: local(), {}),
    "adapter_off": (lambda caches: SelfTeacher("adapter_off"), {"peft_config": lora}),
    "live": (lambda caches: SelfTeacher("live"), {"peft_config": lora}),
    "frozen_copy": (lambda caches: SelfTeacher("frozen_copy"), {}),
    "ema": (lambda caches: EmaTeacher(0.5), {}),
    "ema_adapter": (lambda caches: EmaTeacher(0.5), {"peft_config": lora}),
    "early_exit": (lambda caches: EarlyExitTeacher(1, weights="live"), {"peft_config": lora}),
    "early_exit_fitted": (lambda caches: EarlyExitTeacher(1, "trained", 3, True, "live"), {"peft_config": lora}),
    "snapshot": (lambda caches: SnapshotTeacher(every=1), {"peft_config": lora}),
    "cached_hidden": (lambda caches: CachedTeacher(caches["hidden"]), {}),
    "cached_top_k": (lambda caches: CachedTeacher(caches["top_k"]), {}),
    "cached_sampled": (lambda caches: CachedTeacher(caches["sampled"]), {}),
    "mixture": (lambda caches: MixtureTeacher({"one": local(1), "two": local(2)}, {"one": 3.0, "two": 1.0}), {}),
    "routed": (lambda caches: RoutedTeacher({"one": local(1), "two": local(2)}), {"rows": ROUTED}),
    "cross_tokenizer": (
        lambda caches: CrossTokenizerTeacher(make_model(seed=1, vocab_size=330), tokenizer=make_tokenizer(330)),
        {"objective": "span_likelihood"},
    ),
}

every_teacher = pytest.mark.parametrize("kind", KINDS)


def settings_of(kind: str, caches: dict) -> dict[str, Any]:
    """A fresh teacher and what else its runs need."""
    make, others = KINDS[kind]
    settings = {name: value() if callable(value) else value for name, value in others.items()}
    return {"teacher": make(caches), **settings}


@every_teacher
def test_accumulation_changes_no_teachers_lesson(tmp_path, caches, kind):
    """A teacher that speaks of a batch, and not of its rows, teaches something else when memory is short."""
    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    first, losses = run(tmp_path / "whole", **whole, **settings_of(kind, caches))
    second, others = run(tmp_path / "parts", **parts, **settings_of(kind, caches))
    assert losses == pytest.approx(others, rel=1e-4)
    assert worst_difference(first, second) < 1e-4


@every_teacher
def test_padding_side_changes_no_teachers_lesson(tmp_path, caches, kind):
    """Rows that are found by their place in a padded batch are other rows when the padding is on the other side."""
    found = {}
    for side in ("left", "right"):
        settings = settings_of(kind, caches)
        teacher = settings["teacher"]
        rows = DistillationDataset(
            settings.pop("rows", ROWS[:16]),
            PromptBuilder(make_tokenizer(), PromptStyle()),
            demonstrations=DEMONSTRATIONS,
            route=teacher.route,
            teacher_builder=PromptBuilder(teacher.tokenizer, PromptStyle()) if teacher.other_vocabulary else None,
        )
        collator = DistillationCollator(make_tokenizer().pad_token_id, padding_side=side)
        found[side] = run(tmp_path / side, rows=rows, data_collator=collator, **settings)
    assert found["left"][1] == pytest.approx(found["right"][1], rel=1e-4)
    assert worst_difference(found["left"][0], found["right"][0]) < 1e-4


@every_teacher
def test_a_run_without_padding_changes_no_teachers_lesson(tmp_path, caches, kind):
    """Rows of a teacher that isn't told, or looks them up in the batch, must be the same beside a flat student's."""
    whole = {} if kind.startswith("cached") else {"demonstrations": DEMONSTRATIONS[:1]}  # no prefix worth reusing
    first, losses = run(tmp_path / "padded", **{**settings_of(kind, caches), **whole})
    second, others = run(tmp_path / "flat", padding_free=True, **{**settings_of(kind, caches), **whole})
    assert losses == pytest.approx(others, rel=1e-5)
    assert worst_difference(first, second) < 1e-4


@every_teacher
def test_a_resumed_run_has_the_same_teacher(tmp_path, caches, kind):
    """What a teacher has become in half a run must not be lost with the process."""
    straight, _ = run(tmp_path / "straight", max_steps=3, **settings_of(kind, caches))
    kept = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path / "stopped", **kept, **settings_of(kind, caches)).train()
    resumed = make_trainer(tmp_path / "stopped", **kept, **settings_of(kind, caches))
    before = {name: value.detach().clone() for name, value in resumed.model.named_parameters() if value.requires_grad}
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    update = {
        name: value.detach() - before[name] for name, value in resumed.model.named_parameters() if name in before
    }
    assert worst_difference(straight, update) < 1e-5


@every_teacher
def test_only_the_student_is_trained_and_saved(tmp_path, caches, kind):
    """A teacher in the optimizer, or beside the saved student, is a mistake of gigabytes."""
    trainer = make_trainer(tmp_path, **settings_of(kind, caches))
    trainer.train()
    learned = {id(one) for one in trainer.model.parameters() if one.requires_grad}
    optimized = {id(one) for group in trainer.optimizer.param_groups for one in group["params"]}
    assert optimized == learned
    trainer.save_model(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("teacher*"))


@every_teacher
def test_every_teacher_describes_itself_for_the_record(tmp_path, caches, kind):
    """A run record that can't be written loses the run; one with a path of this machine tells too much."""
    trainer = make_trainer(tmp_path, **settings_of(kind, caches))
    told = json.dumps(trainer.teacher.describe())
    assert "kind" in told and str(tmp_path) not in told


@every_teacher
def test_no_teacher_leaves_a_trace_in_the_student(tmp_path, caches, kind):
    """A teacher that borrows the student's weights must give them back, in their mode and with their gradients."""
    trainer = make_trainer(tmp_path, **settings_of(kind, caches))
    model = trainer.model.train()
    before = {name: (one.detach().clone(), one.requires_grad) for name, one in model.named_parameters()}
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    first = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(10))
    first.backward()
    assert all(module.training for module in model.modules() if "teacher" not in type(module).__name__.lower())
    for name, one in model.named_parameters():
        value, learns = before[name]
        assert torch.equal(one, value) and one.requires_grad == learns
        assert not learns or one.grad is not None
