"""What a checkpoint holds besides the student: the parameters of losses, the state of a teacher that changes, and the
texts that are kept to be learned from again.

Each is one safetensors file beside the student's, and there is none where there is nothing to keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn

from hfkd.rollout.on_policy import Writer
from hfkd.teachers import Teacher

OBJECTIVE_FILE = "objective.safetensors"
TEACHER_FILE = "teacher.safetensors"
TEXTS_FILE = "texts.{process}.safetensors"


def save_companions(
    folder: str, objective: nn.Module, teacher: Teacher | None, writer: Writer | None = None, first: bool = True
) -> None:
    """Write what has a state: the first process what all share, and each its own texts.

    Args:
        folder: Of the checkpoint.
        objective: Its losses may hold parameters.
        teacher: May hold a state.
        writer: May keep texts.
        first: Whether this process writes what all share.
    """
    for name, owner in _owners(objective, teacher, writer):
        state = owner.state_dict()
        if state and (first or owner is writer):
            Path(folder).mkdir(parents=True, exist_ok=True)  # another process may be here first
            save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, Path(folder) / name)


def load_companions(folder: str, objective: nn.Module, teacher: Teacher | None, writer: Writer | None = None) -> None:
    """Take back what `save_companions` wrote.

    Raises:
        FileNotFoundError: Something here has a state, but the checkpoint holds none: it was made with other parts, or
            on another number of processes, or keeps the model only.
    """
    for name, owner in _owners(objective, teacher, writer):
        if not owner.state_dict():
            continue
        file = Path(folder) / name
        if not file.exists():
            processes = PartialState().num_processes
            texts = f", on the number of processes that it was made with (here {processes})" if owner is writer else ""
            raise FileNotFoundError(
                f"{folder} has no {name}, but {type(owner).__name__} has a state to restore. Resume with the "
                f"objective, the teacher and the buffer that the checkpoint was made with{texts}, or start anew (a "
                "checkpoint of save_only_model keeps none of them)."
            )
        owner.load_state_dict(load_file(file))


def _owners(objective: nn.Module, teacher: Teacher | None, writer: Writer | None) -> Iterator[tuple[str, Any]]:
    yield OBJECTIVE_FILE, objective
    if teacher is not None:
        yield TEACHER_FILE, teacher
    if writer is not None:
        yield TEXTS_FILE.format(process=PartialState().process_index), writer
