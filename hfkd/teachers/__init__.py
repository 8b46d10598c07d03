"""Teachers: who says what the student should have said. Which *prompt* a teacher reads is decided in `hfkd.data`;
which *weights* it uses, here.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from hfkd.teachers.base import Teacher, evaluating
from hfkd.teachers.cached import CachedTeacher
from hfkd.teachers.cross_tokenizer import CrossTokenizerTeacher
from hfkd.teachers.early_exit import EarlyExitTeacher
from hfkd.teachers.local import LocalTeacher, ModelTeacher
from hfkd.teachers.moving import EmaTeacher, ShadowTeacher, SnapshotTeacher
from hfkd.teachers.self_teacher import SelfTeacher
from hfkd.teachers.several import MixtureTeacher, RoutedTeacher, SeveralTeachers
from hfkd.teachers.vocabulary import check_embeddings, check_same_tokens

_CLASSES = {
    "ema": "EmaTeacher()",
    "snapshot": "SnapshotTeacher()",
    "early_exit": "EarlyExitTeacher()",
    "cached": "CachedTeacher(folder)",
    "mixture": "MixtureTeacher({name: teacher, ...})",
    "routed": "RoutedTeacher({name: teacher, ...})",
    "cross_tokenizer": "CrossTokenizerTeacher(model)",
}


def as_teacher(teacher: Teacher | PreTrainedModel | str | None, adapter: bool) -> Teacher | None:
    """Make a teacher from its short form.

    Args:
        teacher: A teacher, a loaded model, a hub id or folder, `"self"`, or None.
        adapter: Whether the student is a PEFT model; then `"self"` is the base under it, otherwise a frozen copy.
    """
    if teacher is None or isinstance(teacher, Teacher):
        return teacher
    if teacher == "self":
        return SelfTeacher("adapter_off" if adapter else "frozen_copy")
    if isinstance(teacher, Mapping):
        raise ValueError(
            "teacher is a mapping; expected one teacher. Several are MixtureTeacher({name: teacher, ...}) or "
            "RoutedTeacher({name: teacher, ...}) of hfkd.teachers."
        )
    if isinstance(teacher, str) and teacher in _CLASSES:
        raise ValueError(f"teacher is {teacher!r}, which is no hub id; make one: {_CLASSES[teacher]}.")
    return LocalTeacher(teacher)


__all__ = [
    "CachedTeacher",
    "CrossTokenizerTeacher",
    "EarlyExitTeacher",
    "EmaTeacher",
    "LocalTeacher",
    "MixtureTeacher",
    "ModelTeacher",
    "RoutedTeacher",
    "SelfTeacher",
    "SeveralTeachers",
    "ShadowTeacher",
    "SnapshotTeacher",
    "Teacher",
    "as_teacher",
    "check_embeddings",
    "check_same_tokens",
    "evaluating",
]
