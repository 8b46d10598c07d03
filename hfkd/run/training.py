"""The trainer of a recipe, and what writes its texts. Runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfkd.data.collate import DistillationCollator
from hfkd.objective import Objective
from hfkd.rollout.base import Rollout
from hfkd.rollout.buffer import OffPolicyBuffer
from hfkd.rollout.hf import HFRollout
from hfkd.rollout.vllm import VllmRollout
from hfkd.run.build import Run
from hfkd.run.texts import make_dataset
from hfkd.trainer import DistillationTrainer

if TYPE_CHECKING:
    from torch import nn

    from hfkd.teachers import Teacher


def make_trainer(
    run: Run,
    rows: Sequence[dict[str, Any]],
    model: nn.Module,
    teacher: Teacher | None,
    objective: Objective,
    config: Any,
) -> DistillationTrainer:
    """A trainer over these rows, with both views of each example, and the writer of its texts, as the recipe says.

    Without a teacher it learns the rows' own answers.
    """
    writes = teacher is not None and set(run.recipe.data.shares) != {"dataset"}
    written = {"answer": run.recipe.data.shares, "rollout": make_rollout(run), "buffer": make_buffer(run)}
    return DistillationTrainer(
        model,
        teacher,
        objective,
        config,
        train_dataset=make_dataset(run, rows, teacher, objective),
        processing_class=run.tokenizer,
        data_collator=DistillationCollator(run.tokenizer.pad_token_id),
        **(written if writes else {}),
    )


def make_rollout(run: Run) -> Rollout:
    """What writes text, as the recipe says."""
    generation = run.recipe.data.generation
    if generation.backend == "vllm":
        return VllmRollout(run.tokenizer, run.generation, options=generation.vllm)
    return HFRollout(run.tokenizer, run.generation)


def make_buffer(run: Run) -> OffPolicyBuffer | None:
    """What keeps the texts, if the recipe wants them kept."""
    generation = run.recipe.data.generation
    return OffPolicyBuffer(generation.buffer_size, generation.reuse) if generation.buffer_size else None
