"""What the collator promises: two views of the same answers.

A `View` is one padded batch of token ids with its mask and its labels. A `Batch` holds the student's view and, where
the teacher reads another prompt, the teacher's. The promise is that the supervised ids of both views are the same ids
in the same order, so row i of the student and row i of the teacher predict the same token, whatever the two prompts
are. Where the teacher has another tokenizer, the promise is about stretches of text instead of ids.

This module knows nothing of models, teachers or losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""The label of a position where nothing is learned."""

_FIELDS = ("input_ids", "attention_mask", "labels")
_BESIDE = ("route", "student_span", "teacher_span")
_EACH_TOKEN = ("token_weights", "private")


def predicted(labels: Tensor) -> Tensor:
    """Mark the positions whose prediction is supervised: position t predicts `labels[:, t + 1]`.

    Args:
        labels: [B, T] token ids, `IGNORE` where nothing is learned.

    Returns:
        [B, T - 1] booleans. This is the shift that every count and every row selection in the project goes through.
    """
    return labels[:, 1:] != IGNORE


@dataclass(frozen=True)
class View:
    """One padded batch of sequences as a model reads them.

    Args:
        input_ids: [B, T] token ids.
        attention_mask: [B, T] ones on real tokens, zeros on padding (left or right).
        labels: [B, T] the ids to learn, `IGNORE` elsewhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def position_ids(self) -> Tensor:
        """[B, T] positions that count real tokens only, so that left padding does not move learned positions."""
        return (self.attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)

    @property
    def targets(self) -> Tensor:
        """[N] the supervised token ids, row by row."""
        return self.labels[:, 1:][predicted(self.labels)]

    @property
    def tokens(self) -> int:
        """The number N of supervised tokens."""
        return int(predicted(self.labels).sum())

    def flat(self) -> FlatView:
        """Lay the rows end to end in one row, without their padding.

        Returns:
            The real tokens, at the positions that they have here; the supervised ones are the same, in the same order.

        Raises:
            ValueError: A supervised token is padding, or would be predicted from padding: the padded view learns it
                from nothing, and in one row it would be learned from another text.
        """
        real = self.attention_mask.bool()
        if bool((predicted(self.labels) & ~(real[:, :-1] & real[:, 1:])).any()):
            raise ValueError(
                "The labels learn a token of the padding, or the first real token of a row that is padded on the "
                f"left, which nothing stands before to predict it from. Set their labels to {IGNORE}."
            )
        if not bool(real.any()):  # a model can't read nothing
            real = torch.zeros_like(real)
            real[:, 0] = True
        first = real & (real.long().cumsum(dim=-1) == 1)
        labels = self.labels.masked_fill(first, IGNORE)
        lengths = real.sum(dim=-1)
        row = (tokens[real][None] for tokens in (self.input_ids, self.position_ids, labels))
        return FlatView(*row, lengths[lengths > 0])


@dataclass(frozen=True)
class FlatView:
    """The S real tokens of a view in one row, see `View.flat`.

    Args:
        input_ids: [1, S] token ids.
        position_ids: [1, S] positions, from 0 in each sequence.
        labels: [1, S] the ids to learn, `IGNORE` elsewhere and on the first token of each sequence, so that none is
            predicted from the sequence before it.
        lengths: [B] tokens of each sequence; rows without any are left out.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Batch:
    """The student's view, the teacher's view where it differs, and what else is known of the texts.

    Args:
        student: What the student reads.
        teacher: What the teacher reads; None where it reads the student's view.
        token_weights: [N] factors of the supervised tokens in the order of `student.targets`; None means 1.
        route: [B] the number of the teacher that each text belongs to, where there are several; else None.
        student_span: [B, T] where the teacher cuts the text into other tokens: the number, within its row, of the
            stretch of text that each token of the student's view belongs to, -1 where it belongs to none; else None.
            The two views then needn't learn the same ids.
        teacher_span: [B, T'] the same for the teacher's view.
        own_text: Whether the student wrote what is supervised.
        private: [N] how private each supervised token is, from 0 (not at all) to 1: terms that learn the text count it
            that much less, and losses may read it; None means 0.
    """

    student: View
    teacher: View | None = None
    token_weights: Tensor | None = None
    route: Tensor | None = None
    student_span: Tensor | None = None
    teacher_span: Tensor | None = None
    own_text: bool = False
    private: Tensor | None = None

    @property
    def teacher_view(self) -> View:
        """The view that the teacher reads."""
        return self.student if self.teacher is None else self.teacher

    def to_inputs(self) -> dict[str, Tensor]:
        """Flatten to the dictionary of tensors that Trainer and Accelerate move, count and slice.

        Returns:
            `input_ids`, `attention_mask`, `labels`, with a teacher view also `teacher_*`, with weights also
            `token_weights` [B, T], with scores `private` [B, T], and the other fields that are there under their
            names.
        """
        inputs = {name: getattr(self.student, name) for name in _FIELDS}
        if self.teacher is not None:
            inputs |= {f"teacher_{name}": getattr(self.teacher, name) for name in _FIELDS}
        for name in _EACH_TOKEN:
            if (values := getattr(self, name)) is not None:
                padded = torch.zeros(self.student.labels.shape, dtype=torch.float32, device=values.device)
                padded[:, 1:][predicted(self.student.labels)] = values.float()
                inputs[name] = padded
        inputs |= {name: getattr(self, name) for name in _BESIDE if getattr(self, name) is not None}
        return inputs | ({"own_text": True} if self.own_text else {})

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Tensor]) -> Batch:
        """Rebuild the batch from `to_inputs`.

        Args:
            inputs: The dictionary that the collator returned.

        Raises:
            KeyError: A field of a view is missing.
        """
        missing = [name for name in _FIELDS if name not in inputs]
        if missing:
            raise KeyError(
                f"The batch has the keys {sorted(inputs)} but a distillation batch needs {list(_FIELDS)}; missing "
                f"{missing}. "
                "Use `hfkd.data.DistillationCollator`, or return these keys from your own collator."
            )
        student = View(*(inputs[name] for name in _FIELDS))
        teacher = None
        if "teacher_input_ids" in inputs:
            teacher = View(*(inputs[f"teacher_{name}"] for name in _FIELDS))
        beside = {name: inputs.get(name) for name in _BESIDE}
        for name in _EACH_TOKEN:
            padded = inputs.get(name)
            beside[name] = None if padded is None else padded[:, 1:][predicted(student.labels)].float()
        return cls(student, teacher, **beside, own_text=bool(inputs.get("own_text", False)))
