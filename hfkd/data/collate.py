"""Examples of unequal length to one padded batch of tensors.

The promise of the project is checked here, on integers: the supervised ids of both views of an example are the same
ids in the same order or, where the teacher has a tokenizer of its own, that both are cut into the same spans. The
collator knows no tokenizer beyond the padding id, and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor

from hfkd.batch import IGNORE, Batch, View
from hfkd.data.alignment import NO_SPAN
from hfkd.errors import NothingToLearn


class DistillationCollator:
    """Pads examples of `DistillationDataset`, checks them and returns what `Batch.to_inputs` returns.

    Args:
        pad_token_id: Stands where there is no token; its attention mask is 0 and its label -100.
        padding_side: `right` or `left`.
        pad_to_multiple_of: Round the padded length of each view up to a multiple of so many tokens.

    Raises:
        ValueError: There is no padding id, or the side doesn't exist.
    """

    def __init__(
        self,
        pad_token_id: int,
        padding_side: Literal["right", "left"] = "right",
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if pad_token_id is None:
            raise ValueError("pad_token_id is None; set tokenizer.pad_token, to the end token if there is no other")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side is {padding_side!r}; expected 'right' or 'left'")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make one batch.

        Args:
            features: Examples with `student`, `teacher` (or None), `index`, and optionally `token_weights`, one number
                for each token of the student's view, of which only those of supervised tokens count, `route`, the
                number of the row's teacher, and `group`, that of its domain; with a teacher that has another tokenizer
                `student_span` and `teacher_span`, the number of each token's span.

        Returns:
            `input_ids`, `attention_mask`, `labels` [B, T], `teacher_*` [B, T'] where there are teacher views, and
            `token_weights` [B, T], `route` [B], `group` [B], `student_span` [B, T] and `teacher_span` [B, T'] where
            the examples have them.

        Raises:
            NothingToLearn: No token of an example is supervised.
            ValueError: The two views of an example are supervised on different ids or different spans, or only some
                examples have a teacher's view, weights, a route or spans.
        """
        for position, feature in enumerate(features):
            _check(feature, feature.get("index", position))
        with_teacher = _all_or_none(features, "teacher")
        with_weights = _all_or_none(features, "token_weights")
        with_spans = _all_or_none(features, "student_span")
        student = self._view([feature["student"] for feature in features], self.pad_token_id)
        teacher = None
        if with_teacher:
            # The student's padding id may lie outside another vocabulary; what stands there is masked anyway.
            pad = 0 if with_spans else self.pad_token_id
            teacher = self._view([feature["teacher"] for feature in features], pad)
        weights = None
        if with_weights:
            padded = self._pad([_weights(feature) for feature in features], 0.0).float()
            weights = padded[:, 1:][student.labels[:, 1:] != IGNORE]
        numbers = {
            name: torch.tensor([feature[name] for feature in features], dtype=torch.long)
            for name in ("route", "group")
            if _all_or_none(features, name)
        }
        names = ("student_span", "teacher_span") if with_spans else ()
        spans = {name: self._pad([feature[name] for feature in features], NO_SPAN) for name in names}
        inputs = Batch(student, teacher, weights, route=numbers.get("route"), **spans).to_inputs()
        return inputs | numbers  # a domain is for what decides what is learned: no model and no loss reads it

    def _view(self, sequences: Sequence[Mapping[str, list[int]]], pad_token_id: int) -> View:
        return View(
            input_ids=self._pad([each["input_ids"] for each in sequences], pad_token_id),
            attention_mask=self._pad([[1] * len(each["input_ids"]) for each in sequences], 0),
            labels=self._pad([each["labels"] for each in sequences], IGNORE),
        )

    def _pad(self, sequences: Sequence[Sequence[float]], value: float) -> Tensor:
        length = max(len(each) for each in sequences)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        fillers = [[value] * (length - len(each)) for each in sequences]
        left = self.padding_side == "left"
        return torch.tensor(
            [[*fill, *each] if left else [*each, *fill] for fill, each in zip(fillers, sequences, strict=True)]
        )


def _learned(view: Mapping[str, list[int]]) -> list[int]:
    """The ids that are learned; the first position has none before it that could predict it."""
    return [label for label in view["labels"][1:] if label != IGNORE]


def _check(feature: Mapping[str, Any], index: int) -> None:
    student = _learned(feature["student"])
    if not student:
        raise NothingToLearn(
            f"example {index}: no token of the student's view is supervised; its completion is empty, or the chat "
            "template marks no assistant turn"
        )
    if feature.get("student_span") is not None:
        return _check_spans(feature, index)
    if feature.get("teacher") is None:
        return
    teacher = _learned(feature["teacher"])
    if student != teacher:
        pairs = enumerate(zip_longest(student, teacher))
        place, (ours, theirs) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
        raise ValueError(
            f"example {index}: the supervised ids of the two views differ first at position {place} of the "
            f"answer: the student's view has {ours} and the teacher's {theirs} ({len(student)} and {len(teacher)} "
            "ids in all); both views must end in the same answer tokens, tokenized apart from the prompt"
        )


def _check_spans(feature: Mapping[str, Any], index: int) -> None:
    """Both views have the same spans, in ascending order and on supervised tokens alone."""
    found = []
    for side in ("student", "teacher"):
        view, numbers = feature.get(side), feature.get(f"{side}_span")
        if view is None or numbers is None:
            raise ValueError(f"example {index} has spans but no {side if view is None else f'{side}_span'!r}")
        marked = [number for number in numbers if number != NO_SPAN]
        learned = [label != IGNORE for label in [IGNORE, *view["labels"][1:]]]
        if len(numbers) != len(learned) or any(
            n != NO_SPAN and not one for n, one in zip(numbers, learned, strict=True)
        ):
            raise ValueError(
                f"example {index}: {side}_span has {len(numbers)} numbers for {len(learned)} tokens, or numbers a "
                "token that isn't learned; expected one number for each token, -1 where nothing is learned"
            )
        if marked != sorted(marked):
            raise ValueError(f"example {index}: the numbers of {side}_span aren't ascending: {marked}")
        found.append(sorted(set(marked)))
    if found[0] != found[1] or not found[0]:
        raise ValueError(
            f"example {index}: the student's view has the spans {found[0]} and the teacher's {found[1]}; expected the "
            "same numbers, at least one: each span is a piece of text that both predict"
        )


def _all_or_none(features: Sequence[Mapping[str, Any]], name: str) -> bool:
    having = [feature.get(name) is not None for feature in features]
    if any(having) and not all(having):
        lacking = features[having.index(False)].get("index", having.index(False))
        raise ValueError(
            f"example {lacking} has no {name!r} but others of its batch do; give it to all examples or to none"
        )
    return any(having)


def _weights(feature: Mapping[str, Any]) -> list[float]:
    weights, length = list(feature["token_weights"]), len(feature["student"]["input_ids"])
    if len(weights) != length:
        raise ValueError(
            f"example {feature.get('index')}: {len(weights)} token_weights for {length} tokens of the student's "
            "view; expected one for each token"
        )
    return weights
