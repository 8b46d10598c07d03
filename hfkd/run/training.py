"""The trainer of a recipe, and what writes its texts. Runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import IntervalStrategy

from hfkd.data.collate import DistillationCollator
from hfkd.data.views import DistillationDataset
from hfkd.eval.tracking import KShotCallback
from hfkd.objective import Objective
from hfkd.recipe.parts import make_revisers, make_sampler
from hfkd.rollout.base import Rollout
from hfkd.rollout.buffer import OffPolicyBuffer
from hfkd.rollout.hf import HFRollout
from hfkd.rollout.vllm import VllmRollout
from hfkd.run.build import Run
from hfkd.run.texts import held_out_views, make_dataset
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
    eval_rows: Sequence[dict[str, Any]] | None = None,
    draws: bool = True,
) -> DistillationTrainer:
    """A trainer over these rows, with both views of each example, and the writer of its texts, as the recipe says.

    Without a teacher it learns the rows' own answers, all of them alike. Where `config.eval_strategy` says so, it
    evaluates while it trains: the loss on held-out texts, and what `hfkd.eval.tracking` asks.

    Args:
        run: With its rows, its tokenizer and its prompt builder.
        rows: To train on.
        model: The student.
        teacher: Prepared by the trainer; None for none.
        objective: Of the training.
        config: Its settings.
        eval_rows: Held-out texts; None takes the recipe's evaluation items.
        draws: Whether the recipe's sampler draws, which may need more rows than a trial has.

    Raises:
        ValueError: It is to evaluate, and there are no held-out texts; or no text fits its limits.
    """
    writes = teacher is not None and set(run.recipe.data.shares) != {"dataset"}
    written = {"answer": run.recipe.data.shares, "rollout": make_rollout(run), "buffer": make_buffer(run)}
    aside = teacher is None and run.recipe.teacher.kind != "none"  # a training for comparison
    evaluates = config.eval_strategy != IntervalStrategy.NO
    return DistillationTrainer(
        model,
        teacher,
        objective,
        config,
        train_dataset=make_dataset(run, rows, teacher, objective),
        eval_dataset=_held_out(run, eval_rows, teacher, objective) if evaluates else None,
        processing_class=run.tokenizer,
        data_collator=DistillationCollator(run.tokenizer.pad_token_id),
        callbacks=make_callbacks(run) if evaluates else [],
        **(written if writes else {}),
        sampler=make_sampler(run.recipe) if draws and not aside else None,
        revisers=[] if aside else make_revisers(run.recipe),
    )


def make_callbacks(run: Run) -> list[KShotCallback]:
    """What asks the recipe's questions at each evaluation; nothing where it has none."""
    evaluation, task = run.recipe.evaluation, run.evaluation
    if task is None or not task.shots:
        return []
    settings = evaluation.model_dump(
        include={"samples", "tolerance", "max_new_tokens", "batch_size", "seed", "reshuffle"}
    )
    return [
        KShotCallback(task.items, task.demonstrations, run.builder, shots=task.shots, extract=task.extract, **settings)
    ]


def _held_out(
    run: Run, rows: Sequence[dict[str, Any]] | None, teacher: Teacher | None, objective: Objective
) -> DistillationDataset:
    """Both views of the held-out texts; those that don't fit are left out."""
    if rows is None and run.evaluation is None:
        raise ValueError(
            f"training.eval_strategy: got {run.config.eval_strategy.value!r}, and there is nothing to evaluate on; "
            "add an evaluation section, or leave this key out"
        )
    return held_out_views(run, run.evaluation.items if rows is None else rows, teacher, objective)


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
