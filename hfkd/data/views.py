"""The training set: each example as the student reads it and as the teacher reads it.

The teacher's prompts are fixed and tokenized once. The student's demonstrations are drawn anew at each visit, as a
pure function of seed, epoch and example, so that workers and processes can't change them. Nothing is ever cut. This
module knows prompts and lengths; it doesn't know models, batches or where the rows come from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from hfkd.batch import IGNORE
from hfkd.data.alignment import NothingInCommon, align, span_column
from hfkd.data.messages import Row, prompt_key
from hfkd.data.prompts import PromptBuilder
from hfkd.data.route import Route, check_route, route_of
from hfkd.data.tokenize import Encoded, answer_start, encode, prompt_length
from hfkd.data.weights import TokenWeights, weights_of
from hfkd.prefix import common_prefix


class Example(TypedDict):
    """What the collator takes: two views and the place of an example; `teacher` is None where one view is enough.
    `token_weights`, one for each token of the student's view, and `route`, the number of the row's teacher, are there
    where they were asked for; `student_span` and `teacher_span`, the number of each token's span, where the teacher
    has a tokenizer of its own; `group`, the number of the row's domain, where all rows have one.
    """

    student: Encoded
    teacher: Encoded | None
    index: int
    token_weights: NotRequired[list[float]]
    route: NotRequired[int]
    student_span: NotRequired[list[int]]
    teacher_span: NotRequired[list[int]]
    group: NotRequired[int]


@dataclass(frozen=True)
class _Stored:
    """The teacher's view behind the shared prefix, in five bytes a token where a list of ints takes forty."""

    ids: np.ndarray
    supervised: np.ndarray

    @classmethod
    def of(cls, encoded: Encoded) -> _Stored:
        labels = np.asarray(encoded["labels"], dtype=np.int64)
        return cls(np.asarray(encoded["input_ids"], dtype=np.int32), labels != IGNORE)

    def behind(self, length: int) -> _Stored:
        return _Stored(self.ids[length:].copy(), self.supervised[length:].copy())

    def encoded(self, prefix: list[int]) -> Encoded:
        labels = np.where(self.supervised, self.ids, IGNORE)
        return {
            "input_ids": [*prefix, *self.ids.tolist()],
            "labels": [IGNORE] * len(prefix) + labels.tolist(),
        }


def shown_demonstrations(row: Row, fixed: Sequence[Row] = ()) -> list[Row]:
    """The demonstrations of a row: its own `demonstrations` if it has any, else the fixed ones.

    Of its own demonstrations, those that ask what the row asks are left out. The fixed ones are returned as they are;
    a training row that is among them isn't an example at all, see `DistillationDataset`.
    """
    own = row.get("demonstrations")
    if not own:
        return list(fixed)
    key = prompt_key(row)
    return [shown for shown in own if prompt_key(shown) != key]


def teacher_prompts(rows: Sequence[Row], builder: PromptBuilder, fixed: Sequence[Row] = ()) -> list[list[int]]:
    """The prompts that a teacher answers: all demonstrations, and the privileged context where a row has one.

    Args:
        rows: The rows to ask.
        builder: Writes and tokenizes.
        fixed: Demonstrations of the rows that have none of their own.

    Returns:
        Token ids, one list for each row.
    """
    return [builder.encode_prompt(row, shown_demonstrations(row, fixed), privileged=True) for row in rows]


class DistillationDataset(Dataset):
    """Rows as pairs of views.

    The teacher reads all demonstrations and the row's `privileged_context`; the student reads as many demonstrations
    as are drawn from `student_shots`, without that context. A row may bring its own `demonstrations`. A row whose
    prompt is among the fixed demonstrations is left out of training, since the teacher would copy the answer it was
    just shown; `dropped_demonstrations` counts these.

    Args:
        rows: Training rows with a prompt and a completion, or `messages`.
        builder: Writes and tokenizes.
        demonstrations: Shown to the teacher in this order, and drawn from for the student.
        student_shots: The numbers of demonstrations that a draw picks from, all equally likely.
        teacher_view: Whether a teacher reads a prompt of its own.
        max_length: The longest student view, in tokens, with the longest demonstrations that a draw can pick.
        teacher_max_length: The longest teacher view, in tokens; None means `max_length`.
        too_long: `raise`, or `drop` and count in `dropped`; rows of whose answer the two tokenizers can write nothing
            in common are treated like those that are too long.
        whole_text: Learn the whole student view, see `hfkd.data.tokenize.encode`; excludes a second view.
        seed: Of the student's draws.
        token_weights: How much each supervised token counts, see `hfkd.data.weights`; None counts all alike.
        route: The column that names each row's teacher, and the names that it may hold; None where one teaches all.
        teacher_builder: Writes and tokenizes for a teacher with a tokenizer of its own; None where it has the
            student's.
        name: What the rows are called in messages, such as `training`.

    Attributes:
        second_view: Whether the teacher's prompt ever differs from the student's; where it doesn't, `teacher` is None.
        shared_prefix: What all prompts of the teacher begin with, shorter than each of them. Of the view that the
            teacher reads; empty where that changes with the student's draws.
        longest_prompts: By view (`student`, `teacher`), the most tokens that any example has before its last answer,
            with the longest demonstrations that a draw can pick.
        groups: The names that the column `domain` has, sorted; empty where it is missing in a row that is kept.
        dropped: Rows left out because a view was too long, or the tokenizers had nothing in common.
        dropped_demonstrations: Rows left out because they are demonstrations.

    Raises:
        ValueError: No rows, or none left; a view longer than its limit; more shots than demonstrations; a second view
            together with `whole_text`; a row that can't be written, or that names no known teacher; an answer that the
            teacher's tokenizer or template writes in other words.
    """

    def __init__(
        self,
        rows: Sequence[dict],
        builder: PromptBuilder,
        *,
        demonstrations: Sequence[dict] = (),
        student_shots: Sequence[int] = (0,),
        teacher_view: bool = True,
        max_length: int = 2048,
        teacher_max_length: int | None = None,
        too_long: Literal["raise", "drop"] = "raise",
        whole_text: bool = False,
        seed: int = 0,
        token_weights: TokenWeights | None = None,
        route: Route | None = None,
        teacher_builder: PromptBuilder | None = None,
        name: str = "training",
    ) -> None:
        _check_settings(rows, student_shots, too_long, name)
        self.builder, self.demonstrations, self.seed = builder, list(demonstrations), seed
        self.teacher_builder, self.name = teacher_builder, name
        self.student_shots, self.whole_text, self.teacher_view = tuple(student_shots), whole_text, teacher_view
        self.max_length, self.teacher_max_length = max_length, teacher_max_length or max_length
        self.too_long, self.token_weights, self.route = too_long, token_weights, check_route(route)
        self.second_view, self.dropped, self.dropped_demonstrations = False, 0, 0
        self.longest_prompts = {"student": 0, "teacher": 0}
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._rows = rows
        self._kept: list[int] = []
        self._teacher: list[_Stored] = []
        self._spans: list[tuple[np.ndarray, np.ndarray]] = []
        self.shared_prefix: list[int] = []
        self.groups: list[str] = []
        self._read_rows()

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        """The two views of an example in the present epoch.

        Raises:
            ValueError: The drawn demonstrations make the student's view longer than `max_length`.
        """
        index = range(len(self))[index]
        row = self.row(index)
        student = self._encode_student(row, self.drawn(index))
        self._check_length(len(student["input_ids"]), self._kept[index], "student")
        teacher = self._teacher[index].encoded(self.shared_prefix) if self.second_view else None
        example: Example = {"student": student, "teacher": teacher, "index": index}
        if self.token_weights is not None:
            example["token_weights"] = weights_of(self.token_weights, row, student["labels"], IGNORE)
        if self.route is not None:
            example["route"] = route_of(self.route, row)
        if self.groups:
            example["group"] = self.groups.index(str(row["domain"]))
        if self._spans:
            ours, theirs = self._spans[index]
            example["student_span"] = span_column(ours.tolist(), student["labels"])
            example["teacher_span"] = span_column(theirs.tolist(), teacher["labels"])
        return example

    def read_by_teacher(self, index: int) -> Encoded:
        """What the teacher reads of an example; without a view of its own that is the student's."""
        if self.second_view:
            return self._teacher[index].encoded(self.shared_prefix)
        return self._encode_student(self.row(index), self.drawn(index))

    @property
    def epoch(self) -> int:
        """The epoch that decides the student's draws."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the student's demonstrations anew; workers that already run see it, the number lies in shared
        memory."""
        self._epoch.fill_(epoch)

    def drawn(self, index: int) -> list[Row]:
        """The demonstrations that the student reads with an example in the present epoch."""
        available = shown_demonstrations(self.row(index), self.demonstrations)
        draw = random.Random(f"{self.seed}/{self.epoch}/{index}")  # a string seed is the same on every machine
        return draw.sample(available, draw.choice(self.student_shots))

    @property
    def teacher_prompts(self) -> list[list[int]]:
        """What the teacher reads before each answer, in order; empty without a second view."""
        return [
            [*self.shared_prefix, *stored.ids[: int(stored.supervised.argmax())].tolist()] for stored in self._teacher
        ]

    @property
    def student_prompts(self) -> list[list[int]]:
        """What the student reads before each answer in the present epoch, in order."""
        views = (self._encode_student(self.row(index), self.drawn(index)) for index in range(len(self)))
        return [view["input_ids"][: prompt_length(view)] for view in views]

    @property
    def kept(self) -> list[int]:
        """Which of the given rows are examples: neither too long nor demonstrations themselves."""
        return list(self._kept)

    def row(self, index: int) -> Row:
        """The row that an example was made of."""
        return self._rows[self._kept[index]]

    def _encode_student(self, row: Row, shown: Sequence[Row]) -> Encoded:
        return encode(self.builder, row, shown, whole_text=self.whole_text)

    def _read_rows(self) -> None:
        """Tokenize and measure all rows, keep those that fit, and find out what the teacher's prompts share."""
        fixed = {prompt_key(shown) for shown in self.demonstrations}
        weight = _weigher(self.builder)
        constant: list[np.ndarray] = []
        domains: set[str | None] = set()
        for number in range(len(self._rows)):
            row = self._rows[number]
            try:
                if not row.get("demonstrations") and prompt_key(row) in fixed:
                    self.dropped_demonstrations += 1
                    continue
                self._read_row(number, row, weight, constant)
                if self._kept[-1:] == [number]:
                    domains.add(None if row.get("domain") is None else str(row["domain"]))
            except ValueError as error:
                if isinstance(error, _TooLong):
                    raise
                raise ValueError(f"{self.name} row {number}: {error}") from error
        self._check_left()
        self.groups = [] if None in domains else sorted(domains)
        if not self.second_view:
            self._teacher = []
        elif self.whole_text:
            raise ValueError(
                "whole_text learns every token of the student's text, but the teacher reads another prompt, so "
                "the two views share no such tokens; set data.whole_text to false, or train on the text alone with "
                "teacher.kind: none"
            )
        if self.teacher_view or max(self.student_shots) == 0:
            self.shared_prefix = common_prefix((ids.tolist() for ids in constant), min(map(len, constant)) - 1)
            self._teacher = [stored.behind(len(self.shared_prefix)) for stored in self._teacher]

    def _read_row(self, number: int, row: Row, weight: Callable[[Row], int], constant: list[np.ndarray]) -> None:
        if self.route is not None:
            route_of(self.route, row)  # a fault is found now, not in training
        available = shown_demonstrations(row, self.demonstrations)
        _check_shots(self.student_shots, len(available))
        heaviest = sorted(available, key=weight, reverse=True)[: max(self.student_shots)]
        student = self._encode_student(row, heaviest)
        fits = self._check_length(len(student["input_ids"]), number, "student", drop=True)
        read, spans = student, None
        if self.teacher_view:
            read = encode(self.teacher_builder or self.builder, row, available, privileged=True)
            fits = self._check_length(len(read["input_ids"]), number, "teacher", drop=True) and fits
        if fits and self.teacher_view and self.teacher_builder is not None:
            spans = self._align(row)
            fits = spans is not None
        if not fits:
            self.dropped += 1
            return
        if self.token_weights is not None and (isinstance(self.token_weights, str) or not self._kept):
            weights_of(self.token_weights, row, student["labels"], IGNORE)  # a fault is found now, not in training
        self._kept.append(number)
        for view, encoded in (("student", student), ("teacher", read)):
            self.longest_prompts[view] = max(self.longest_prompts[view], answer_start(encoded))
        stored = _Stored.of(read)
        constant.append(stored.ids[: prompt_length(read)])
        if not self.teacher_view:
            return
        self._teacher.append(stored)
        if spans is not None:
            self._spans.append(tuple(np.asarray(side, dtype=np.int32) for side in spans))
        several = bool(available) and (len(set(self.student_shots)) > 1 or max(self.student_shots) > 1)
        other = several or self.teacher_builder is not None
        self.second_view = self.second_view or other or read["input_ids"] != student["input_ids"]

    def _align(self, row: Row) -> tuple[list[int], list[int]] | None:
        """The spans of a row's answer; None where it has none and such rows are dropped."""
        try:
            return align(self.builder.answer_pieces(row), self.teacher_builder.answer_pieces(row))
        except NothingInCommon:
            if self.too_long == "raise":
                raise
            return None

    def _check_length(self, length: int, number: int, view: str, drop: bool = False) -> bool:
        limit, setting = (
            (self.max_length, "max_length") if view == "student" else (self.teacher_max_length, "teacher_max_length")
        )
        if length <= limit:
            return True
        if drop and self.too_long == "drop":
            return False
        longest = " with the longest demonstrations that can be drawn" if view == "student" and drop else ""
        raise _TooLong(
            f"{self.name} row {number}: the {view}'s view has {length} tokens{longest}, the limit is "
            f"{setting}={limit}; raise data.{setting}, show fewer or shorter demonstrations, or set data.too_long "
            "to drop. Nothing is ever cut"
        )

    def _check_left(self) -> None:
        if self._kept:
            return
        unlike = ", or hold nothing that both tokenizers can write" if self.teacher_builder is not None else ""
        raise ValueError(
            f"none of {len(self._rows)} {self.name} rows is left: {self.dropped} are longer than "
            f"max_length={self.max_length} (student) or {self.teacher_max_length} (teacher){unlike}, "
            f"{self.dropped_demonstrations} are demonstrations themselves; raise the limits, or give other rows"
        )


class _TooLong(ValueError):
    """A view is longer than its limit; the message names the row."""


def _check_settings(rows: Sequence[Any], shots: Sequence[int], too_long: str, name: str) -> None:
    if len(rows) == 0:
        raise ValueError(f"the {name} set is empty{'; look at data.train' if name == 'training' else ''}")
    if not shots or any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in shots):
        raise ValueError(f"student_shots is {list(shots)}; expected numbers of demonstrations such as [0, 1]")
    if too_long not in ("raise", "drop"):
        raise ValueError(f"too_long is {too_long!r}; expected 'raise' or 'drop'")


def _check_shots(shots: Sequence[int], available: int) -> None:
    if max(shots) > available:
        raise ValueError(
            f"student_shots asks for {max(shots)} demonstrations but there are {available}; lower "
            "data.student_shots or raise data.demonstrations.count"
        )


def _weigher(builder: PromptBuilder) -> Callable[[Row], int]:
    """Tokens that a demonstration takes, measured once for each."""
    known: dict[int, tuple[Row, int]] = {}

    def weight(shown: Row) -> int:
        if id(shown) not in known:
            length = len(builder.encode_prompt(shown)) + len(builder.encode_completion(shown))
            known[id(shown)] = (shown, length)  # the row is kept, so that its id isn't given to another one
        return known[id(shown)][1]

    return weight
