"""Rows out of a padded batch and back: what a model is asked in both views, and the answer behind it.

The answer's ids are the same in both views by construction. Knows nothing of who writes an answer, or when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hfkd.batch import IGNORE

Side = Literal["right", "left"]


@dataclass(frozen=True)
class Text:
    """One row without padding.

    Attributes:
        student: What the student reads before the answer.
        teacher: What the teacher reads before it; None where it reads the same.
        answer: The ids that are learned behind both.
        route: Which member of a routed teacher teaches the row.
        asked: False for a row that supervised nothing as it came: its views are kept whole and it stays silent.
    """

    student: list[int]
    teacher: list[int] | None
    answer: list[int]
    route: int | None = None
    asked: bool = True

    def answered(self, ids: Sequence[int]) -> Text:
        """The same prompts with another answer."""
        return replace(self, answer=list(ids))


def read_texts(batch: Mapping[str, Any]) -> list[Text]:
    """Take the rows out of a batch, each with its last answer; what an earlier turn supervised becomes prompt.

    Args:
        batch: What `Batch.to_inputs` returns.

    Raises:
        ValueError: A row is supervised from its first token on, only one of its views is supervised, or the views
            have tokens of two vocabularies.
    """
    if "student_span" in batch or "teacher_span" in batch:
        raise ValueError(
            "The batch has spans, since its teacher has another tokenizer, and a text that is written during training "
            "can't be aligned with them. Take answer='dataset' for this teacher."
        )
    students = _split(batch, "")
    teachers = _split(batch, "teacher_") if "teacher_input_ids" in batch else [None] * len(students)
    routes = batch["route"].tolist() if batch.get("route") is not None else [None] * len(students)
    return [_text(number, *row) for number, row in enumerate(zip(students, teachers, routes, strict=True))]


def padding_side(batch: Mapping[str, Any]) -> Side | None:
    """Where a batch is padded; None where all its rows are equally long."""
    for name in ("attention_mask", "teacher_attention_mask"):
        mask = batch.get(name)
        if mask is not None and not bool(mask.all()):
            return "left" if bool((mask[:, 0] == 0).any()) else "right"
    return None


def write_batch(
    texts: Sequence[Text], like: Mapping[str, Any], pad_id: int, side: Side, own_text: bool
) -> dict[str, Any]:
    """Pad rows to a batch that learns their answers.

    Args:
        texts: The rows.
        like: A batch whose devices, types and kinds of views are taken over.
        pad_id: Stands where there is no token.
        side: Where to pad.
        own_text: Whether the student wrote the answers.

    Returns:
        `input_ids`, `attention_mask` and `labels` [B, T], `teacher_*` [B, T'] and `route` [B] where `like` has them,
        and `own_text`.
    """
    batch = _view([(text.student, text.answer) for text in texts], like, "", pad_id, side)
    if "teacher_input_ids" in like:
        batch |= _view([(text.teacher, text.answer) for text in texts], like, "teacher_", pad_id, side)
    if like.get("route") is not None:
        batch["route"] = like["route"].new_tensor([text.route for text in texts])
    return {**batch, "own_text": own_text}


def _split(batch: Mapping[str, Any], view: str) -> list[tuple[list[int], list[int] | None]]:
    """For each row all its ids, and those before its last answer (None where nothing is supervised)."""
    names = (f"{view}input_ids", f"{view}attention_mask", f"{view}labels")
    rows = []
    for ids, mask, labels in zip(*(batch[name].tolist() for name in names), strict=True):
        real = [(token, label) for token, kept, label in zip(ids, mask, labels, strict=True) if kept]
        rows.append(([token for token, _ in real], _prompt(real)))
    return rows


def _prompt(row: list[tuple[int, int]]) -> list[int] | None:
    place = len(row)
    while place and row[place - 1][1] == IGNORE:
        place -= 1
    if not place:
        return None
    while place and row[place - 1][1] != IGNORE:
        place -= 1
    return [token for token, _ in row[:place]]


def _text(number: int, student: tuple, teacher: tuple | None, route: int | None) -> Text:
    asked = student[1] is not None
    if teacher is not None and (teacher[1] is not None) != asked:
        raise ValueError(
            f"Row {number} of the batch is supervised in the {'student' if asked else 'teacher'}'s view alone; both "
            "views must learn the same answer. Look at the collator."
        )
    if not asked:
        return Text(student[0], teacher and teacher[0], [], route, asked=False)
    if not student[1] or (teacher is not None and not teacher[1]):
        raise ValueError(
            f"Row {number} of the batch is supervised from its first token on, so there is no prompt to write behind. "
            "What a model writes during training needs a prompt: leave out whole_text, and don't copy input_ids to "
            "labels."
        )
    return Text(student[1], teacher and teacher[1], [], route)


def _view(
    rows: Sequence[tuple[list[int], list[int]]], like: Mapping[str, Any], view: str, pad_id: int, side: Side
) -> dict[str, Tensor]:
    width = max(len(prompt) + len(answer) for prompt, answer in rows)

    def padded(name: str, filler: int, sequences: list[list[int]]) -> Tensor:
        gaps = [[filler] * (width - len(each)) for each in sequences]
        pairs = zip(gaps, sequences, strict=True)
        values = [gap + each if side == "left" else each + gap for gap, each in pairs]
        return torch.tensor(values, dtype=like[name].dtype, device=like[name].device)

    fields = {
        f"{view}input_ids": (pad_id, [prompt + answer for prompt, answer in rows]),
        f"{view}attention_mask": (0, [[1] * (len(prompt) + len(answer)) for prompt, answer in rows]),
        f"{view}labels": (IGNORE, [[IGNORE] * len(prompt) + answer for prompt, answer in rows]),
    }
    return {name: padded(name, *field) for name, field in fields.items()}
