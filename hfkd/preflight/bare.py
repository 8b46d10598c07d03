"""The models of a run without their weights: from their configurations, on the meta device, where they take nothing.

What is loaded already is taken as it is. A narrowed student is the exception: which heads are kept is read from the
weights, so it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hfkd.loading import load_config_of
from hfkd.recipe.checks import is_own_class
from hfkd.recipe.schema import StudentSection, TeacherSection
from hfkd.run.build import Run
from hfkd.run.models import load_student, load_tokenizer, make_teacher, put_adapter
from hfkd.student import keep_layers
from hfkd.teachers import CachedTeacher, LocalTeacher, SeveralTeachers, Teacher


class CannotEstimate(ValueError):
    """The memory of a run can't be known beforehand; the message says why."""


def bare_student(run: Run) -> nn.Module:
    """The run's student with its adapter, without weights unless they are there already.

    Args:
        run: With or without its model.

    Raises:
        CannotEstimate: Its weights are quantised.
        OSError: Its configuration can't be found.
        ValueError: It hasn't the blocks that `student.init` keeps.
    """
    section = run.recipe.student
    model = run.model
    if model is None and section.init is not None and section.init.narrows:
        model = load_student(run.recipe, run.config.seed)
    if model is None:
        model = _from_config(section.origin, section, {"attn_implementation": section.attn_implementation})
        if section.init is not None:
            with torch.device("meta"):
                model = keep_layers(model, section.init.keep_layers)
        if section.lora is not None:
            with torch.device("meta"):
                model = put_adapter(model, section.lora)
    return _not_quantised(model, "the student")


def bare_teacher(run: Run) -> Teacher | None:
    """A teacher as the run's, whose own models have no weights unless they are there already; not prepared.

    Args:
        run: With or without its teacher.

    Raises:
        CannotEstimate: It is a class of the user's own, or its weights are quantised.
        CacheError: Its cache is missing or damaged.
        OSError: The configuration of a model can't be found.
    """
    recipe = run.recipe
    sections = recipe.teacher.members or {"": recipe.teacher}
    own = [section.kind for section in sections.values() if is_own_class(section.kind)]
    if own:
        raise CannotEstimate(f"what {own[0]} holds isn't known before it is asked")
    teacher = make_teacher(recipe)
    if isinstance(teacher, CachedTeacher):
        teacher.verify = False  # a few rows are read, to see how wide they are
    loaded = _members(run.teacher)
    for name, member in _members(teacher).items():
        if isinstance(member, LocalTeacher):
            known, section = getattr(loaded.get(name), "model", None), sections[name]
            model = known if known is not None else _from_config(section.model, section, {})
            member.model = _not_quantised(model, "the teacher")
            if member.other_vocabulary:
                member.tokenizer = getattr(loaded.get(name), "tokenizer", None) or load_tokenizer(section)
    return teacher


def _members(teacher: Teacher | None) -> Mapping[str, Teacher]:
    if teacher is None:
        return {}
    return teacher.teachers if isinstance(teacher, SeveralTeachers) else {"": teacher}


def local_members(teacher: Teacher | None) -> list[LocalTeacher]:
    """The teachers that have a model of their own from the start."""
    return [member for member in _members(teacher).values() if isinstance(member, LocalTeacher)]


def every_member(teacher: Teacher | None) -> list[Teacher]:
    """All teachers, or the one that there is."""
    return list(_members(teacher).values())


def _from_config(name: str, section: StudentSection | TeacherSection, options: Mapping[str, Any]) -> nn.Module:
    """A model on the meta device, in the type that its weights would have."""
    options = {**{key: value for key, value in options.items() if value is not None}, **section.load_kwargs}
    where = {"revision": section.revision, "trust_remote_code": section.trust_remote_code, **section.load_kwargs}
    config = load_config_of(name, where)
    if options.get("quantization_config") or getattr(config, "quantization_config", None):
        raise CannotEstimate(f"{name} is quantised, and what its kernels take isn't known before they run")
    dtype = options.get("dtype", section.dtype)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    made = {"dtype": getattr(torch, dtype) if isinstance(dtype, str) else dtype}
    if attention := options.get("attn_implementation"):
        made["attn_implementation"] = attention
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=section.trust_remote_code, **made)


def _not_quantised(model: nn.Module, what: str) -> nn.Module:
    if getattr(model, "is_quantized", False):
        raise CannotEstimate(f"{what} is quantised, and what its kernels take isn't known before they run")
    return model
