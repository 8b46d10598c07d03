"""Texts that a transform lets student or teacher write, kept beside the run where it has a folder.

Knows prompts as token ids. What a text is asked for, and what becomes of it, is the transform's business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hfkd.data.messages import completion_text, prompt_key
from hfkd.data.views import teacher_prompts
from hfkd.rollout.answers import teacher_answers
from hfkd.rollout.base import GenerationSettings, Rollout
from hfkd.sharding import is_sharded
from hfkd.transforms.base import Row, Workshop

STUDENT, TEACHER = "student", "teacher"
WRITERS = (STUDENT, TEACHER)


def check_writer(workshop: Workshop, writer: str, who: str) -> None:
    """Make sure that there is somebody to write, before anything is written.

    Args:
        workshop: With the models.
        writer: `student` or `teacher`.
        who: Asks, for messages.

    Raises:
        ValueError: There is no such model, or it can't write.
    """
    if workshop.rollout is None or (writer == STUDENT and workshop.student is None):
        raise ValueError(f"{who} lets the {writer} write, and the workshop has no model or no rollout; give both.")
    if not workshop.rollout.any_model:
        raise ValueError(
            f"{who} writes before training, which {type(workshop.rollout).__name__} can't do. Set "
            "data.generation.backend to transformers."
        )
    if writer == TEACHER and (workshop.teacher is None or not workshop.teacher.writes):
        kind = "there is none" if workshop.teacher is None else f"{type(workshop.teacher).__name__} can't write"
        raise ValueError(f"{who} lets the teacher write, and {kind}. Take a teacher that is one model in memory.")


def labelled(rows: Sequence[Row], workshop: Workshop, who: str) -> list[Row]:
    """Copy the rows, each with its answer as the text to learn: a row without one takes what stands in its `answer`.

    Args:
        rows: As they were given.
        workshop: Says how answers are written.
        who: Asks, for messages.

    Raises:
        ValueError: A row has neither; names it.
    """
    return [_labelled(number, row, workshop, who) for number, row in enumerate(rows)]


def _labelled(number: int, row: Row, workshop: Workshop, who: str) -> Row:
    try:
        completion_text(row)
        return dict(row)
    except ValueError as error:
        answer = row.get("answer")
        if isinstance(answer, str) and answer.strip():
            return workshop.builder.with_answer(row, answer)
        raise ValueError(
            f"{who}: row {number} ({prompt_key(row)[:60]!r}) has no answer, neither as its completion nor in the "
            f"column answer: {error}. Give each row one, or take {who} out of data.transforms."
        ) from error


def prompts_of(workshop: Workshop, writer: str, rows: Sequence[Row], demonstrations: bool = False) -> list[list[int]]:
    """What the writer reads of each row.

    Args:
        workshop: Says how prompts are written.
        writer: The teacher reads its demonstrations and the row's privileged context; the student reads neither.
        rows: To be answered.
        demonstrations: Whether the student reads the demonstrations, too.
    """
    if writer == TEACHER:
        return teacher_prompts(rows, workshop.builder, workshop.demonstrations)
    shown = workshop.demonstrations if demonstrations else ()
    return [workshop.builder.encode_prompt(row, shown) for row in rows]


def written(
    workshop: Workshop, writer: str, prompts: Sequence[list[int]], name: str, draw: int = 0, **settings: Any
) -> list[str]:
    """Let a model write behind each prompt; equal prompts have equal texts.

    Args:
        workshop: With the models.
        writer: `student` or `teacher`.
        prompts: Token ids.
        name: Of the file in the workshop's folder: what is written there isn't written again.
        draw: Which samples; another number draws others.
        settings: Fields of `GenerationSettings` in place of the rollout's.

    Returns:
        The texts without surrounding white space, in the order of the prompts.

    Raises:
        ValueError: The file is of other weights or settings.
    """

    def speaks() -> AbstractContextManager[nn.Module]:
        return workshop.teacher.weights() if writer == TEACHER else nullcontext(workshop.student)

    if not prompts:
        return []
    rollout = workshop.rollout
    with _settings(rollout, settings), rollout.at_step(draw, workshop.seed):
        if workshop.folder is None:
            with speaks() as model:
                return [completion.text.strip() for completion in rollout.generate(model, prompts)]
        with speaks() as model:
            fingerprint = {"writer": writer, "weights": weights_digest(model)}
        path = workshop.folder / f"{name}.jsonl"
        return teacher_answers([{}] * len(prompts), prompts, rollout, speaks, path, fingerprint, writer)


def weights_digest(model: nn.Module) -> str:
    """What tells these weights from others, alike on every machine: the first and the last number of each parameter,
    hashed. Of a model in shards its names and shapes alone.
    """
    digest, whole = hashlib.sha256(), not is_sharded(model)
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if whole and parameter.numel():
            ends = parameter.detach().flatten()[[0, -1]].to("cpu", torch.float32)
            digest.update(ends.numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _settings(rollout: Rollout, changes: dict[str, Any]) -> Iterator[None]:
    """A rollout with other settings inside; one that has none stays as it is."""
    settings = getattr(rollout, "settings", None)
    if not changes or not isinstance(settings, GenerationSettings):
        yield
        return
    rollout.settings = replace(settings, **changes)
    try:
        yield
    finally:
        rollout.settings = settings
