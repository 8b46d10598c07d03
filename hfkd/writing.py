"""What writes a step's text in a training, made of what the user gave and what follows from student and data."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from hfkd.compatibility import check_room
from hfkd.data.prompts import PromptStyle
from hfkd.data.views import DistillationDataset
from hfkd.rollout.base import GenerationSettings, Rollout
from hfkd.rollout.buffer import OffPolicyBuffer
from hfkd.rollout.hf import HFRollout
from hfkd.rollout.on_policy import Mixture, ModelContext, Writer
from hfkd.rows import position_count
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
