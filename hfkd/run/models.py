"""Tokenizer, student and teacher of a recipe, read from folders or the hub.

Knows how a damaged file shows itself and says so in one sentence; it doesn't know what the models are used for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkd.named import import_class, import_function
from hfkd.recipe.schema import InitSection, LoraSection, Recipe, StudentSection, TeacherSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfkd.sharding import Launch
    from hfkd.teachers import Teacher


def token_weights(name: str | None) -> Any:
    """The function that `data.token_weights` names, or the column in which the rows of a recipe hold them.

    Raises:
        ValueError: The function can't be imported, or is none.
    """
    if name is None or ":" in name:
        return name and import_function(name, "data.token_weights")
    return "token_weights"  # whatever the file calls it


def load_tokenizer(section: StudentSection | TeacherSection) -> PreTrainedTokenizerBase:
    """The tokenizer of the student or of a local teacher; a missing padding token becomes the end token.

    Raises:
        OSError: It can't be found or read.
    """
    from hfkd.loading import load_tokenizer_of, readable

    located = {**section.load_kwargs, "revision": section.revision, "trust_remote_code": section.trust_remote_code}
    teaches = isinstance(section, TeacherSection)
    origin, key = (section.model, "teacher.model") if teaches else (section.origin, section.origin_key)
    tokenizer = readable(lambda: load_tokenizer_of(origin, located), f"the tokenizer of {key} {origin}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_student(recipe: Recipe, seed: int) -> PreTrainedModel:
    """The student with its adapter, the same for the same seed.

    Raises:
        OSError: The model can't be found, or a file of it is truncated or damaged.
        ValueError: The model hasn't the blocks that `student.init` keeps, or can't be cut.
    """
    from transformers import set_seed

    from hfkd.loading import load_causal_lm

    student = recipe.student
    settings = {"revision": student.revision, "dtype": student.dtype, "trust_remote_code": student.trust_remote_code}
    if student.attn_implementation is not None:
        settings["attn_implementation"] = student.attn_implementation
    model = load_causal_lm(student.origin, student.origin_key, **{**settings, **student.load_kwargs})
    if student.init is not None:
        model = _cut(model, student.init)
    if student.lora is None:
        return model
    if getattr(model, "is_quantized", False):
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, bool(recipe.training.get("gradient_checkpointing")))
    set_seed(seed)
    adapted = put_adapter(model, student.lora)
    if student.init is not None:  # behind the whole model, whose name it bears, the adapter would be another one
        adapted.active_peft_config.base_model_name_or_path = str(base_folder(recipe))
    return adapted


def put_adapter(model: PreTrainedModel, lora: LoraSection) -> PreTrainedModel:
    """The adapter of a recipe on a model, with new weights."""
    from peft import LoraConfig, get_peft_model

    settings = lora.model_dump(include={"r", "target_modules", "modules_to_save"})
    config = LoraConfig(lora_alpha=lora.alpha, lora_dropout=lora.dropout, task_type="CAUSAL_LM", **settings)
    return get_peft_model(model, config)


def _cut(model: PreTrainedModel, init: InitSection) -> PreTrainedModel:
    from hfkd.narrowing import narrow
    from hfkd.student import keep_layers

    try:
        if init.keep_layers is not None:
            model = keep_layers(model, init.keep_layers)
    except ValueError as error:
        raise ValueError(f"student.init.keep_layers: {error}") from error
    try:
        return narrow(model, heads=init.heads, intermediate=init.intermediate) if init.narrows else model
    except ValueError as error:
        raise ValueError(f"student.init: {error}") from error


def base_folder(recipe: Recipe) -> Path:
    """Where the model under an adapter is written when it is found nowhere else: beside the adapter."""
    return Path(recipe.training["output_dir"]) / "base"


def save_base(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the model that an adapter was trained on, if the run cut it out of a larger one; otherwise nothing.

    Args:
        recipe: The adapter's own.
        tokenizer: Goes with it.
    """
    student = recipe.student
    if student.init is None or student.lora is None:
        return
    bare = recipe.model_copy(update={"student": student.model_copy(update={"lora": None})})
    load_student(bare, seed=0).save_pretrained(base_folder(recipe))
    tokenizer.save_pretrained(base_folder(recipe))


def describe_student(recipe: Recipe, model: PreTrainedModel) -> dict[str, Any]:
    """Plain data for the run record: where the student is from, and what of it was kept."""
    from hfkd.narrowing import narrowed
    from hfkd.student import kept_layers

    origin = recipe.student.origin
    described: dict[str, Any] = {"source": "folder" if Path(origin).exists() else "hub"}
    if recipe.student.init is None:
        return described
    if (found := kept_layers(model.config)) is not None:
        described |= {"kept_layers": found[0], "layers_before": found[1]}
    if (narrower := narrowed(model.config)) is not None:
        described["narrowed"] = {
            name: {"kept": part.kept, "of": part.of, "share_of_weights": [round(share, 4) for share in part.shares]}
            for name, part in (("heads", narrower.heads), ("intermediate", narrower.intermediate))
            if part is not None
        }
    return described


def prepare_teacher(
    recipe: Recipe,
    teacher: Teacher | None,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    launch: Launch,
) -> None:
    """Load another model as the teacher, after a look at whether its tokens are the student's.

    Args:
        recipe: Says where the teacher is.
        teacher: From `make_teacher`; only one that is another model is prepared here.
        student: The student's model.
        tokenizer: The student's tokenizer; prompts are written with it, and the teacher reads the same ids.
        launch: How the run was started.

    Raises:
        VocabularyError: An id stands for different tokens.
        OSError: The teacher's model can't be found or read.
    """
    from hfkd.teachers import (
        CrossTokenizerTeacher,
        LocalTeacher,
        SeveralTeachers,
        check_embeddings,
        check_same_tokens,
    )

    members = teacher.teachers if isinstance(teacher, SeveralTeachers) else {"": teacher}
    sections = recipe.teacher.members if isinstance(teacher, SeveralTeachers) else {"": recipe.teacher}
    for name, member in members.items():
        if not isinstance(member, LocalTeacher) or isinstance(member, CrossTokenizerTeacher):
            continue
        if sections[name].model is None:  # a class of the user's own, which says itself what it loads
            member.prepare(launch, student)
            member.check_vocabulary(tokenizer)
        else:
            member.tokenizer = load_tokenizer(sections[name])
            check_same_tokens(tokenizer, member.tokenizer)
            member.prepare(launch, student)
            check_embeddings(tokenizer, member.model)


def make_teacher(recipe: Recipe) -> Teacher | None:
    """The teacher that the recipe names; its weights are loaded when it is first needed.

    Raises:
        ValueError: A class of the user's own can't be imported or is no `Teacher`.
    """
    from hfkd.teachers import CachedTeacher, MixtureTeacher, RoutedTeacher

    section = recipe.teacher
    if section.kind == "none":
        return None
    if section.cache is not None:
        return CachedTeacher(section.cache, subset=True)  # what the run expects of it is known once its texts are
    members = {name: _one_teacher(member) for name, member in section.members.items()}
    if section.kind == "mixture":
        return MixtureTeacher(members, {name: member.weight for name, member in section.members.items()})
    return RoutedTeacher(members) if section.kind == "routed" else _one_teacher(section)


def _one_teacher(section: TeacherSection) -> Teacher:
    from hfkd.teachers import (
        CrossTokenizerTeacher,
        EarlyExitTeacher,
        EmaTeacher,
        LocalTeacher,
        SelfTeacher,
        SnapshotTeacher,
    )

    prefix = {"reuse_prefix": section.reuse_prefix}
    if section.kind == "self":
        return SelfTeacher(weights=section.weights, **prefix)
    if section.kind == "ema":
        return EmaTeacher(decay=section.decay, interval=section.interval, **prefix)
    if section.kind == "snapshot":
        return SnapshotTeacher(every=section.every, **prefix)
    if section.kind == "early_exit":
        names = ("layer", "norm", "fit_steps", "only_where_layers_disagree", "weights")
        return EarlyExitTeacher(**{name: getattr(section, name) for name in names}, **prefix)
    if section.kind not in ("local", "cross_tokenizer"):
        return own_teacher(section.kind)(**section.options)
    names = ("revision", "dtype", "trust_remote_code", "load_kwargs", "offload")
    made = LocalTeacher if section.kind == "local" else CrossTokenizerTeacher
    return made(section.model, **{name: getattr(section, name) for name in names}, **prefix)


def own_teacher(name: str) -> type[Teacher]:
    """The class that `teacher.kind: package.module:Class` names.

    Raises:
        ValueError: It can't be imported or is no `Teacher`.
    """
    from hfkd.teachers import Teacher

    return import_class(name, "teacher.kind", Teacher)
