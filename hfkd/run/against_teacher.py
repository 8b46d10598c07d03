"""Holds a student that was trained before against its recipe's teacher, as a run does before and after training.

A trainer is made for its way of running both models on one batch; it trains nothing, and its folder is thrown away.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hfkd.data.collate import DistillationCollator
from hfkd.objective import build_objective
from hfkd.recipe.schema import Recipe, TeacherSection
from hfkd.run.build import Run, make_config
from hfkd.run.models import load_student, make_teacher, prepare_teacher
from hfkd.run.subjects import Subject, identity
from hfkd.run.texts import fidelity_texts
from hfkd.sharding import Launch
from hfkd.teachers import LocalTeacher
from hfkd.trainer import DistillationTrainer

if TYPE_CHECKING:
    from torch import nn

    from hfkd.teachers import Teacher

logger = logging.getLogger(__name__)

_MOVING = ("ema", "snapshot")
_PRECISION = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "padding_free")


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
    """What decides the fidelity besides the student's weights and the rows."""
    data = recipe.data.model_dump(mode="json", exclude={"train", "generation", "answer"})
    sections = _sections(recipe.teacher)
    return {
        "data": data,
        "teacher": recipe.teacher.model_dump(mode="json", exclude={"load_kwargs", "members"}),
        "weights": {key: identity(one.model, one) for key, one in sections.items() if one.model is not None},
        "published": identity(recipe.student.origin, recipe.student) if recipe.teacher.kind == "self" else None,
        "precision": {name: recipe.training.get(name) for name in _PRECISION},
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
        config = make_config(
            recipe, output_dir=scratch, report_to="none", save_strategy="no", eval_strategy="no",
            load_best_model_at_end=False, run_policy="overwrite", log_gradient_norms=False, disable_tqdm=True,
        )  # fmt: skip
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


def _teacher(published: Recipe, subject: Subject) -> Teacher:
    """The recipe's teacher; what was a copy of the student before training is loaded anew."""
    section = published.teacher
    if not (subject.trained and section.kind == "self" and section.weights == "frozen_copy"):
        return make_teacher(published)
    student = published.student.model_copy(update={"lora": None})
    model = load_student(published.model_copy(update={"student": student}), seed=0)
    return LocalTeacher(model, reuse_prefix=section.reuse_prefix)


def _sections(teacher: TeacherSection) -> dict[str, TeacherSection]:
    members = {f"teacher.members.{name}": member for name, member in teacher.members.items()}
    return members or {"teacher": teacher}
