"""A micro-batch read by student and teacher before it is learned: token figures, for what decides by them what is
learned.

It costs one more forward of the student, and of the teacher. On every process the same number of forwards is made,
so it works with whatever the models are wrapped in or spread over. It decides nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hfkd.batch import Batch
from hfkd.distributed import run_inside
from hfkd.packing import run_view
from hfkd.rows import DenseRows, Head, RowLayout, TopKRows, supervised
from hfkd.signal import DISTRIBUTION
from hfkd.teacher_rows import LogitRows
from hfkd.teachers import evaluating
from hfkd.token_figures import TokenFigures, figures_of


def read_batch(trainer: Trainer, inputs: Mapping[str, Any], top_k: int = 1) -> TokenFigures:
    """What both models say of the supervised tokens of a micro-batch, without a gradient and without dropout.

    Args:
        trainer: A `DistillationTrainer` whose teacher is prepared; in training or before.
        inputs: What the collator returned; on any device.
        top_k: How many of the teacher's likeliest ids the masses are taken over.

    Returns:
        Columns in the order of `Batch.student.targets`; `text` is the row within the micro-batch.

    Raises:
        ValueError: There is no teacher, or its rows aren't distributions over the student's vocabulary.
    """
    if trainer.teacher is None:
        raise ValueError("What the teacher says is asked for, and there is no teacher. Pass `teacher=`.")
    batch = Batch.from_inputs(trainer._prepare_inputs(dict(inputs)))
    wrapped = trainer.model_wrapped
    module, found = trainer.accelerator.unwrap_model(wrapped), []
    with torch.no_grad(), evaluating(module), trainer.accelerator.autocast():
        # What leaves a wrapped forward may be changed by its hooks, so the columns leave beside it.
        run_inside(wrapped, module, lambda *_: _inside(trainer, module, batch, top_k, found), batch.student.input_ids)
    return found[0]


def _inside(trainer: Trainer, module: nn.Module, batch: Batch, top_k: int, found: list[TokenFigures]) -> Tensor:
    rows = trainer.teacher.signal(batch, frozenset({DISTRIBUTION})).rows
    if not isinstance(rows, LogitRows | TopKRows):
        raise ValueError(
            f"The teacher gave {type(rows).__name__}, and what is decided by it needs its distribution over the "
            "student's vocabulary. Take a teacher with the student's tokenizer, or a cache with the codec topk or "
            "hidden."
        )
    student = student_rows(trainer, module, batch)
    listed = rows.ids.shape[-1] if isinstance(rows, TopKRows) else rows.vocab_size
    found.append(figures_of_batch(trainer, batch, student, rows, min(top_k, listed)))
    return torch.zeros((), device=student.hidden.device)


def student_rows(trainer: Trainer, module: nn.Module, batch: Batch) -> DenseRows:
    """The student's rows of a batch; to be called inside the wrapped forward.

    Args:
        trainer: Says how the view is run.
        module: The student.
        batch: On its device.
    """
    hidden, labels = run_view(module, batch.student, trainer.args.padding_free)
    return DenseRows(supervised(hidden, labels), Head.of(module))


def figures_of_batch(
    trainer: Trainer, batch: Batch, student: DenseRows, teacher: LogitRows | TopKRows, top_k: int
) -> TokenFigures:
    """The token figures of a batch whose rows are there.

    Args:
        trainer: Says how many rows are projected at once.
        batch: The text.
        student: From `student_rows`.
        teacher: What the teacher said of the same tokens.
        top_k: No more than the teacher lists.
    """
    layout = RowLayout.of(batch.student.labels)
    places = (batch.student.targets, layout.sequence, layout.position)
    return figures_of(student, teacher, *places, top_k=top_k, chunk_size=trainer.objective.chunk_size)
