"""From rows to the views that a trainer learns from, with the settings of a `DistillationConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hfkd.config import DistillationConfig
from hfkd.data.prompts import PromptBuilder, PromptStyle
from hfkd.data.views import DistillationDataset
from hfkd.data.weights import TokenWeights
from hfkd.teachers import Teacher

PLACEHOLDER = "?"
"""Stands for an answer that is written at each step."""


def as_views(
    rows: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: PromptStyle,
    *,
    args: DistillationConfig,
    demonstrations: Sequence[Mapping[str, Any]],
    student_shots: Sequence[int],
    token_weights: TokenWeights | None,
    teacher: Teacher | None,
    placeholder: bool = False,
    own_collator: bool = False,
    name: str = "training",
) -> Any:
    """Make both views of each row; a data set that is ready, or meant for a collator of the user's own, is returned as
    it is.

    Args:
        rows: With `prompt` and `completion`, or `messages`.
        tokenizer: The student's.
        prompts: How rows become prompts.
        args: Limits of the views, and the seed.
        demonstrations: Shown to the teacher, and drawn from for the student.
        student_shots: Numbers of demonstrations in the student's prompt.
        token_weights: See `hfkd.data.weights`.
        teacher: Who reads a view of its own; None where no loss asks it.
        placeholder: Whether the answers are written at each step, so that the rows' own don't count.
        own_collator: Whether the user's own collator makes the views.
        name: What the rows are called in messages.

    Raises:
        ValueError: There is no tokenizer, or the rows are none.
    """
    if rows is None or own_collator or isinstance(rows, DistillationDataset):
        return rows
    if tokenizer is None:
        raise ValueError("Rows of text need a tokenizer: pass `processing_class=AutoTokenizer.from_pretrained(...)`.")
    if isinstance(rows, Dataset) and not hasattr(rows, "column_names"):
        raise ValueError(
            f"train_dataset is a {type(rows).__name__}; expected rows with `prompt` and `completion` or `messages` (a "
            "list of dicts or a datasets.Dataset), a hfkd DistillationDataset, or a `data_collator` of your own "
            "beside it."
        )
    builder = PromptBuilder(tokenizer, prompts)
    other = teacher is not None and teacher.other_vocabulary
    return DistillationDataset(
        [builder.with_answer(row, PLACEHOLDER) for row in rows] if placeholder else rows,
        builder,
        demonstrations=demonstrations,
        student_shots=student_shots,
        token_weights=token_weights,
        teacher_view=teacher is not None,
        teacher_builder=PromptBuilder(teacher.tokenizer, prompts) if other else None,
        route=None if teacher is None else teacher.route,
        max_length=args.max_length,
        teacher_max_length=args.teacher_max_length,
        too_long=args.too_long,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        name=name,
    )
