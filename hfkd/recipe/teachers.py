"""What a recipe must not ask of its teacher, and of who writes the answers: which keys belong to which kind.

Gives one line per fault, as `hfkd.recipe.checks` does for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

from hfkd.named import OWN_NAME
from hfkd.recipe.schema import DataSection, MemberSection, Recipe, SourceSection, TeacherSection
from hfkd.recipe.source import near, shown

_MODEL = ("model", "revision", "dtype", "trust_remote_code", "load_kwargs", "offload")
# The keys that each kind reads, besides kind and reuse_prefix.
_KEYS: dict[str, tuple[str, ...]] = {
    "self": ("weights", "cache"),
    "local": (*_MODEL, "cache"),
    "none": (),
    "ema": ("decay", "interval"),
    "snapshot": ("every",),
    "early_exit": ("weights", "layer", "norm", "fit_steps", "only_where_layers_disagree"),
    "mixture": ("members",),
    "routed": ("members", "column"),
    "cross_tokenizer": _MODEL,
}
_SEVERAL = ("mixture", "routed")
_NO_MEMBER = ("none", *_SEVERAL, "cross_tokenizer")


def teacher_faults(recipe: Recipe) -> Iterator[str]:
    """Faults of the teacher's section, by itself and beside the student's and the data's."""
    teacher = recipe.teacher
    faults = [*_section(teacher, "teacher"), *_adapter(recipe, teacher, "teacher"), *_members(recipe)]
    yield from faults
    if not faults:
        yield from _cache(recipe)
    columns = recipe.data.train.columns
    if "teacher" in columns and teacher.kind != "routed":
        yield "data.train.columns: maps teacher, but nothing reads it; use teacher.kind: routed with teacher.column"


def answer_faults(recipe: Recipe) -> Iterator[str]:
    """Faults of who writes the answers, and how."""
    data, kind = recipe.data, recipe.teacher.kind
    writers = {data.answer} if isinstance(data.answer, str) else set(data.shares)
    if kind == "none" and "teacher" in writers:
        yield "data.answer: teacher lets the teacher write the answers, and teacher.kind is none; use answer: dataset"
    if kind == "none" and "student" in writers and recipe.reinforcement is None:  # there a verifier judges
        yield "data.answer: the student writes, and teacher.kind is none: nobody judges it; name a teacher"
    if "teacher" in writers and kind in (*_SEVERAL, "cross_tokenizer", "early_exit"):
        yield f"data.answer: teacher lets the teacher write, and a teacher of kind {kind} can't; use answer: dataset"
    if "student" in writers and kind == "cross_tokenizer":
        yield "data.answer: the student's text can't be given to a teacher with another tokenizer; use answer: dataset"
    if teaches_unwritten(recipe):
        yield (
            "teacher.norm: trained is fitted to the training texts before the first step, and data.answer has them "
            "written later; use norm: final, or answer: dataset"
        )
    yield from _writing_faults(data)
    yield from _buffer(recipe)


def teaches_unwritten(recipe: Recipe) -> bool:
    """Whether a teacher is to be fitted to texts that aren't there yet."""
    several = [recipe.teacher, *recipe.teacher.members.values()]
    fitted = any(one.kind == "early_exit" and one.norm == "trained" for one in several)
    return fitted and "dataset" not in recipe.data.shares


def _buffer(recipe: Recipe) -> Iterator[str]:
    """A buffer that can't hold what one step writes; values of the wrong type are told elsewhere."""
    names = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # defaults of TrainingArguments
    batch, times = (recipe.training.get(name, default) for name, default in names.items())
    size = recipe.data.generation.buffer_size
    if size and isinstance(batch, int) and isinstance(times, int) and size < batch * times:
        yield (
            f"data.generation.buffer_size: got {size}, and a step writes {batch * times} texts on each process "
            f"(training.per_device_train_batch_size {batch} times training.gradient_accumulation_steps {times}); set "
            "it to a few times as many, or to 0 for no buffer"
        )


def _writing_faults(data: DataSection) -> Iterator[str]:
    """Faults of how text is written while training."""
    generation, writes = data.generation, set(data.shares) != {"dataset"}
    if writes and data.whole_text:
        yield "data.whole_text: every token is learned, so there is no prompt to write behind; use answer: dataset"
    if generation.buffer_size and not writes:
        yield "data.generation.buffer_size: is given, and no text is written while training; leave it out"
    if generation.reuse and not generation.buffer_size:
        yield "data.generation.reuse: is given without data.generation.buffer_size; say how many texts are kept"
    if generation.backend == "vllm" and "student" not in data.shares:
        yield "data.generation.backend: vllm writes the student's text while training, and data.answer asks for none"
    if generation.backend == "vllm" and "teacher" in data.shares:
        yield "data.generation.backend: vllm holds the student's weights, so the teacher can't write with it"
    if generation.vllm and generation.backend != "vllm":
        yield "data.generation.vllm: is given, and the backend is transformers; leave it out, or use backend: vllm"


def second_view_faults(recipe: Recipe) -> Iterator[str]:
    """A teacher with the student's weights and the student's prompt has nothing to say; own prompt code is trusted."""
    data, kind = recipe.data, recipe.teacher.kind
    if not wants_second_view(recipe) or data.prompt.builder is not None or _may_hold_context(data.train):
        return
    if data.demonstrations.count == 0 and may_do_without(recipe.teacher):
        yield (
            f"teacher.kind: {kind} begins as the student and reads the same prompt, and no term learns the text; "
            "set data.demonstrations.count, or add cross_entropy"
        )
    elif data.demonstrations.count == 0:
        yield (
            "teacher.kind: self needs a second prompt, and there is none: data.demonstrations.count is 0 and "
            "the rows of "
            f"{data.train.path} have no privileged_context; set data.demonstrations.count, or map a column to "
            "privileged_context in data.train.columns"
        )
    elif kind == "self" and min(data.student_shots) == data.demonstrations.count:
        yield (
            f"data.student_shots: got {data.student_shots}, as many as the self-teacher reads "
            f"(data.demonstrations.count is "
            f"{data.demonstrations.count}), so both would read the same; give the student fewer"
        )


def wants_second_view(recipe: Recipe) -> bool:
    """Whether the teacher has nothing to say behind the student's own prompt: it has the student's weights, or begins
    with them and no term moves the student away.
    """
    if may_do_without(recipe.teacher):
        return recipe.reinforcement is None and not _may_learn_text(recipe)  # a reward moves the student, too
    return recipe.teacher.kind == "self"


def may_do_without(teacher: TeacherSection) -> bool:
    """Whether it only begins with the student's weights: it differs from a student that learns the text as well."""
    return teacher.kind in ("ema", "snapshot") or (teacher.kind == "self" and teacher.weights == "frozen_copy")


def _may_learn_text(recipe: Recipe) -> bool:
    """Whether a term learns the text's own tokens; a class of the user's own is trusted to."""
    from hfkd.losses import LOSSES, STATE_LOSSES

    kinds = {**LOSSES, **STATE_LOSSES}
    known = [kinds.get(term.kind) for term in recipe.loss.terms]
    return any(loss is None or loss.fits_text or not loss.needs for loss in known)


def _may_hold_context(train: SourceSection) -> bool:
    if "privileged_context" in train.columns:
        return True
    return train.format is None and not train.path.startswith("reasoning_gym:")


def _section(teacher: TeacherSection, key: str) -> Iterator[str]:
    """The keys of one teacher."""
    own = bool(OWN_NAME.match(teacher.kind))
    if teacher.kind not in _KEYS and not own:
        yield (
            f"{key}.kind: got {shown(teacher.kind)}; expected {', '.join(_KEYS)} or package.module:Class"
            f"{near(teacher.kind, _KEYS)}"
        )
        return
    known = {"kind", "reuse_prefix", "weight", *_KEYS.get(teacher.kind, ("options",))}
    for field in sorted(teacher.model_fields_set - known, key=list(type(teacher).model_fields).index):
        value = getattr(teacher, field)
        if value != type(teacher).model_fields[field].get_default(call_default_factory=True):
            got = f"{key}.{field}: got {shown(value)}"
            yield f"{got}, which a teacher of kind {teacher.kind} doesn't use; {_remedy(field)}"
    if "model" in known and teacher.model is None:
        other = "; give a folder or a hub id, or use kind: self" if teacher.kind == "local" else ""
        yield f"{key}.model: is required for a teacher of kind {teacher.kind}{other}"


def _remedy(field: str) -> str:
    if field == "options":
        return "leave it out, or use a class of your own (package.module:Class)"
    kinds = [kind for kind, keys in _KEYS.items() if field in keys]
    return f"leave it out, or use kind: {' or '.join(kinds)}"


def _adapter(recipe: Recipe, teacher: TeacherSection, key: str) -> Iterator[str]:
    own = teacher.kind in ("self", "early_exit")
    if own and teacher.weights == "adapter_off" and recipe.student.lora is None:
        yield (
            f"{key}.weights: adapter_off needs an adapter that can be switched off, and student.lora is not given; "
            "add student.lora, or use weights: frozen_copy or live"
        )


def _members(recipe: Recipe) -> Iterator[str]:
    teacher = recipe.teacher
    if teacher.kind not in _SEVERAL:
        return
    if len(teacher.members) < 2:
        yield (
            f"teacher.members: got {len(teacher.members)}; a teacher of kind {teacher.kind} has at least two, such as "
            "{large: {kind: local, model: ...}, small: {kind: local, model: ...}}"
        )
    if teacher.kind == "routed" and teacher.column is None:
        yield "teacher.column: is required for a teacher of kind routed: the column that names each row's teacher"
    for name, member in teacher.members.items():
        yield from _member(recipe, member, name)


def _member(recipe: Recipe, member: MemberSection, name: str) -> Iterator[str]:
    key = f"teacher.members.{name}"
    if "." in name:
        yield f"{key}: a teacher's name has no dot in it; choose another"
    if member.kind in _NO_MEMBER:
        yield f"{key}.kind: got {member.kind}, which can't be one of several; use local, self, ema or snapshot"
        return
    if member.cache is not None:
        yield f"{key}.cache: one of several teachers can't be read from a cache; leave it out"
    if member.weight != 1.0 and recipe.teacher.kind == "routed":
        yield f"{key}.weight: is given, and each row has one teacher; leave it out, or use teacher.kind: mixture"
    yield from _section(member, key)
    yield from _adapter(recipe, member, key)


def _cache(recipe: Recipe) -> Iterator[str]:
    teacher = recipe.teacher
    if teacher.cache is None:
        return
    if teacher.kind == "self" and teacher.weights == "live":
        yield "teacher.cache: holds what fixed weights said, and teacher.weights is live; use adapter_off, or no cache"
    if set(recipe.data.shares) != {"dataset"}:
        yield (
            f"teacher.cache: holds what the teacher says of texts that were there before, and data.answer is "
            f"{shown(recipe.data.answer)}; use answer: dataset or teacher, or no cache"
        )
