"""Examples of unequal length to one padded batch of tensors.

The promise of the project is checked here, on integers: the supervised ids of both views of an example are the same
ids in the same order. The collator knows no tokenizer beyond the padding id, and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor

from hfkd.batch import IGNORE, Batch, View
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
                for each token of the student's view; only those of supervised tokens count.

        Returns:
            `input_ids`, `attention_mask`, `labels` [B, T], `teacher_*` [B, T'] where there are teacher views, and
            `token_weights` [B, T] where the examples have them.

        Raises:
            NothingToLearn: No token of an example is supervised.
            ValueError: The two views of an example are supervised on different ids, or only some examples have a
                teacher's view or weights.
        """
        for position, feature in enumerate(features):
            _check(feature, feature.get("index", position))
        with_teacher = _all_or_none(features, "teacher")
        with_weights = _all_or_none(features, "token_weights")
        student = self._view([feature["student"] for feature in features])
        teacher = self._view([feature["teacher"] for feature in features]) if with_teacher else None
        weights = None
        if with_weights:
            padded = self._pad([_weights(feature) for feature in features], 0.0).float()
            weights = padded[:, 1:][student.labels[:, 1:] != IGNORE]
        return Batch(student, teacher, weights).to_inputs()

    def _view(self, sequences: Sequence[Mapping[str, list[int]]]) -> View:
        return View(
            input_ids=self._pad([each["input_ids"] for each in sequences], self.pad_token_id),
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
