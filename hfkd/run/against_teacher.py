"""Holds a student that was trained before against its recipe's teacher, as a run does before and after training.

A trainer is made for its way of running both models on one batch; it trains nothing, and its folder is thrown away.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers.utils import is_torch_tf32_available

from hfkd.data.collate import DistillationCollator
from hfkd.objective import build_objective
from hfkd.recipe.schema import Recipe, TeacherSection
from hfkd.run.build import ASIDE, Run, make_config
from hfkd.run.expected import deciding
from hfkd.run.models import load_student, make_teacher, prepare_teacher
from hfkd.run.provenance import deciding_code
from hfkd.run.subjects import Subject, identity
from hfkd.run.texts import fidelity_texts
from hfkd.sharding import Launch
from hfkd.teachers import LocalTeacher
from hfkd.trainer import DistillationTrainer

if TYPE_CHECKING:
    from torch import nn

    from hfkd.teachers import Teacher

logger = logging.getLogger(__name__)

_MOVING = ("ema", "snapshot", "early_exit")
_PRECISION = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "padding_free")
_RUNNING = (
    *(*_PRECISION, "use_cpu", "seed", "data_seed", "output_dir", "chunk_size", "ddp_backend", "ddp_timeout"),
    *("per_device_eval_batch_size", "dataloader_num_workers", "dataloader_pin_memory", "disable_tqdm"),
)


def check_fidelity(recipe: Recipe) -> None:
    """Refuse a recipe whose teacher can't be asked now, before a model is loaded.

    Raises:
        ValueError: There are no held-out texts, no teacher, or one that only the training knew.
    """
    teacher = recipe.teacher
    if recipe.evaluation is None:
        raise ValueError(
            "--fidelity reads the evaluation items, and the recipe has no evaluation section; add one, or give "
            "evaluation.size=48 behind the recipe"
        )
    if teacher.kind == "none":
        raise ValueError(
            "--fidelity needs a teacher to be near to, and teacher.kind is none; name one, such as teacher.kind=local "
            "teacher.model=NAME behind the recipe, or leave --fidelity out"
        )
    if teacher.cache is not None:
        raise ValueError(
            "--fidelity: teacher.cache keeps what the teacher said of the training texts, not of the held-out ones; "
            "give teacher.cache=null behind the recipe, so that the teacher itself is loaded"
        )
    for key, section in _sections(teacher).items():
        if section.kind in _MOVING:
            raise ValueError(
                f"--fidelity: {key}.kind {section.kind} is a model of the training alone, and isn't kept; the "
                "figures that the run itself measured are in its report.json"
            )


def deciding_of(recipe: Recipe) -> dict[str, Any]:
    """What decides the fidelity besides the student's weights, the rows and the versions of packages."""
    data = recipe.data.model_dump(
        mode="json", exclude={"train", "generation", "answer", "sampler", "revise", "transforms"}
    )
    sections = _sections(recipe.teacher)
    return {
        "data": data,
        "teacher": recipe.teacher.model_dump(mode="json", exclude={"load_kwargs", "members"}),
        "members": {key: _deciding(section) for key, section in sections.items()},
        "published": Subject("before", recipe).weights() if is_own(recipe) else None,
        "precision": {name: recipe.training.get(name) for name in _PRECISION},
        "code": deciding_code(recipe, ("teacher", "data")),
    }


def measure_against_teacher(run: Run, subject: Subject, model: nn.Module, published: Recipe) -> dict[str, Any]:
    """What `hfkd.eval.fidelity.measure_fidelity` finds on the held-out texts, as plain data.

    Args:
        run: With its rows, its tokenizer and its prompt builder.
        subject: Whose model it is.
        model: Loaded; of an `adapter_off` teacher with an adapter on it.
        published: The recipe of the student before it was trained, of which a frozen copy is made.

    Raises:
        ValueError: The teacher gives no whole distribution, or the texts hold nothing that both read.
        OSError: The teacher can't be read.
    """
    from hfkd.eval.fidelity import measure_fidelity

    objective = build_objective("forward_kl")  # not what it learned from: this only has the teacher read the texts
    section = run.recipe.evaluation.model_copy(update={"fidelity": True})
    recipe = run.recipe.model_copy(update={"evaluation": section})
    with tempfile.TemporaryDirectory() as scratch:
        config = make_config(recipe, **ASIDE, output_dir=scratch, disable_tqdm=True)
        teacher = _teacher(published, subject)
        prepare_teacher(recipe, teacher, model, run.tokenizer, Launch.of(config))
        asked = replace(run, recipe=recipe, config=config, model=model, teacher=teacher, objective=objective)
        texts = fidelity_texts(asked)
        if not len(texts):
            raise ValueError("--fidelity: none of the held-out texts fits data.max_length; raise it")
        trainer = DistillationTrainer(
            model,
            teacher,
            objective,
            config,
            train_dataset=texts,
            processing_class=run.tokenizer,
            data_collator=DistillationCollator(run.tokenizer.pad_token_id),
        )
        return measure_fidelity(trainer, texts).to_dict()


def without_accessories(recipe: Recipe) -> Recipe:
    """The recipe with those settings of `training` alone that say how a model is run.

    Trackers, plugins, the optimizer and the hub belong to the training, and may be missing where it is evaluated.
    """
    training = {name: value for name, value in recipe.training.items() if name in _RUNNING}
    if not is_torch_tf32_available():
        training.pop("tf32", None)
    return recipe.model_copy(update={"training": training})


def is_own(recipe: Recipe) -> bool:
    """Whether a teacher is the student itself, or was it once."""
    return any(section.kind == "self" for section in _sections(recipe.teacher).values())


def is_switched(recipe: Recipe) -> bool:
    """Whether a teacher is the student with its adapter switched off."""
    sections = _sections(recipe.teacher).values()
    return any(section.kind == "self" and section.weights == "adapter_off" for section in sections)


def _teacher(published: Recipe, subject: Subject) -> Teacher:
    """The recipe's teacher; what was a copy of the student before training is loaded anew."""
    teacher, section = make_teacher(published), published.teacher
    if not subject.trained:
        return teacher
    if not section.members:
        return _anew(published, section) if _is_copy(section) else teacher
    copies = {name: _anew(published, member) for name, member in section.members.items() if _is_copy(member)}
    teacher.teachers |= copies
    return teacher


def _is_copy(section: TeacherSection) -> bool:
    return section.kind == "self" and section.weights == "frozen_copy"


def _anew(published: Recipe, section: TeacherSection) -> Teacher:
    student = published.student.model_copy(update={"lora": None})
    model = load_student(published.model_copy(update={"student": student}), seed=0)
    return LocalTeacher(model, reuse_prefix=section.reuse_prefix)


def _deciding(section: TeacherSection) -> dict[str, Any]:
    """One teacher as it is loaded, and what tells its weights from others."""
    plain = section.model_dump(mode="json", exclude={"members"})
    plain["load_kwargs"] = deciding(plain["load_kwargs"])
    return {**plain, "files": None if section.model is None else identity(section.model, section)}


def _sections(teacher: TeacherSection) -> dict[str, TeacherSection]:
    members = {f"teacher.members.{name}": member for name, member in teacher.members.items()}
    return members or {"teacher": teacher}
