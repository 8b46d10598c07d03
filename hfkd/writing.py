"""What makes a step's batches ready to be learned: which examples, who writes their text, what is revised of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from hfkd.checkpoint import BESIDE
from hfkd.compatibility import check_room
from hfkd.data.prompts import PromptStyle
from hfkd.data.views import DistillationDataset
from hfkd.objective import Objective
from hfkd.revision.base import Reviser
from hfkd.rollout.base import GenerationSettings, Rollout
from hfkd.rollout.buffer import OffPolicyBuffer
from hfkd.rollout.hf import HFRollout
from hfkd.rollout.on_policy import Mixture, ModelContext, Writer
from hfkd.rows import position_count
from hfkd.sampling.base import ExampleSampler
from hfkd.student import pad_token
from hfkd.teachers import Teacher


def make_writer(
    mixture: Mixture,
    rollout: Rollout | None,
    buffer: OffPolicyBuffer | None,
    *,
    model: nn.Module,
    student: ModelContext,
    teacher: Teacher | None,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    style: PromptStyle,
    seed: int,
) -> Writer | None:
    """Make what writes, after a look at whether there is room for it.

    Args:
        mixture: Who writes.
        rollout: How; None greedily, up to a stop string of the prompts or 32 tokens, with transformers.
        buffer: Keeps what the student wrote, or None.
        model: The student.
        student: Makes a context in which the student writes.
        teacher: Prepared.
        dataset: The training set.
        tokenizer: The student's.
        style: Of the prompts, where the data set has none.
        seed: Of the run.

    Returns:
        None where all text is the data set's.

    Raises:
        ValueError: There is a rollout or a buffer, but nothing is written; or no tokenizer; or no room.
    """
    if not mixture.writes:
        if rollout is not None or buffer is not None:
            raise ValueError(
                "`rollout` or `buffer` is given, and no text is written while training. Pass answer='student' (or "
                "shares), or leave them out."
            )
        return None
    if rollout is None:
        if tokenizer is None:
            raise ValueError("Text is to be written, and there is no tokenizer. Pass `processing_class=`.")
        stop = dataset.builder.style.stop if isinstance(dataset, DistillationDataset) else style.stop
        rollout = HFRollout(tokenizer, GenerationSettings(stop=stop))
    positions = {"student": position_count(model)}
    if teacher.writes:
        with teacher.weights() as theirs:
            positions["teacher"] = position_count(theirs)
    check_room(dataset, getattr(rollout, "settings", None), positions)
    return Writer(
        mixture,
        rollout,
        seed=seed,
        student=student,
        teacher=teacher.weights,
        buffer=buffer,
        pad_id=pad_token(tokenizer),
    )


def asks_teacher(objective: Objective, sampler: ExampleSampler | None, revisers: Sequence[Reviser]) -> bool:
    """Whether anything of a training asks the teacher what it says of the texts."""
    deciders = [*revisers, *([] if sampler is None else [sampler])]
    return bool(objective.needs) or any(one.needs_teacher for one in deciders)


def attach_deciders(trainer: Trainer, sampler: ExampleSampler | None, revisers: Sequence[Reviser]) -> None:
    """Give a trainer its sampler and its revisers, and tell them whose they are.

    Args:
        trainer: A `DistillationTrainer` that is otherwise ready.
        sampler: Draws its examples; None leaves that to `Trainer`.
        revisers: Change its batches.

    Raises:
        ValueError: There is nothing to draw from, or what they need isn't there.
    """
    trainer.sampler, trainer.revisers = sampler, list(revisers)
    args, dataset = trainer.args, trainer.train_dataset
    if trainer.sampler is not None:
        if not isinstance(dataset, DistillationDataset):
            raise ValueError(
                "A sampler draws from rows, and train_dataset is "
                f"{'missing' if dataset is None else type(dataset).__name__}. Pass rows, or leave `sampler` out."
            )
        size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        trainer.sampler.attach(dataset, seed=seed, examples_per_step=size)
    for reviser in trainer.revisers:
        reviser.attach(trainer)


def deciders(trainer: Trainer) -> dict[str, Any]:
    """What decides what is learned and may have a state, by the name of its file in a checkpoint."""
    parts = {f"reviser_{place}": reviser for place, reviser in enumerate(trainer.revisers)}
    if trainer.sampler is not None:
        parts["sampler"] = trainer.sampler
    return {f"{BESIDE}{name}_{type(part).__name__}": part for name, part in parts.items()}


def made_ready(trainer: Trainer, batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The micro-batches of a step as they will be learned: with new text where it is written, then revised.

    Args:
        trainer: A `DistillationTrainer`; its meter hears the figures.
        batches: From the data loader.
    """
    step, revised = trainer.state.global_step, list(batches)
    makers = [] if trainer.writer is None else [(trainer.writer, trainer.writer.rewrite)]
    for maker, change in [*makers, *((reviser, reviser.revise) for reviser in trainer.revisers)]:
        revised = change(revised, step)
        for name, ratio in maker.figures().items():
            trainer.meter.add_ratio(name, *ratio)
    return revised
