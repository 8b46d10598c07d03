"""What the tests of losses on hidden states run on: states of two small models, made up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfkd.losses import STATE_LOSSES
from hfkd.losses.state import StateLoss, StateRows
from hfkd.rows import Head, RowLayout

LAYERS, TEACHER_LAYERS, WIDTH, ROWS, VOCABULARY = 3, 6, 8, 12, 19
SEQUENCE = torch.tensor([0] * 5 + [1] * 1 + [2] * 6)

every_state_loss = pytest.mark.parametrize("kind", list(STATE_LOSSES))
AGREEING = [kind for kind in STATE_LOSSES if kind not in ("mutual_information", "norm_direction")]
"""Losses that are 0 where the two states agree."""


def layout_of(sequence: Tensor) -> RowLayout:
    counts = torch.unique_consecutive(sequence, return_counts=True)[1].tolist()
    return RowLayout(sequence, torch.cat([torch.arange(count) for count in counts]))


def states_case(
    teacher_width: int = WIDTH, sequence: Tensor = SEQUENCE, dtype: torch.dtype = torch.float32, seed: int = 0
) -> StateRows:
    """States of every layer of a student and a teacher, a target each, and the teacher's head."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(sequence)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    student = {layer: normal(rows, WIDTH).to(dtype).requires_grad_(True) for layer in range(LAYERS + 1)}
    teacher = {layer: normal(rows, teacher_width).to(dtype) for layer in range(TEACHER_LAYERS + 1)}
    return StateRows(
        student=student,
        teacher=teacher,
        layout=layout_of(sequence),
        targets=torch.randint(VOCABULARY, (rows,), generator=generator),
        teacher_head=Head(normal(VOCABULARY, teacher_width).to(dtype)),
    )


def replaced(states: StateRows, student: dict[int, Tensor], teacher: dict[int, Tensor] | None = None) -> StateRows:
    return StateRows(student, teacher or states.teacher, states.layout, states.targets, states.teacher_head)


def ready(kind: str, teacher_width: int = WIDTH, **arguments) -> StateLoss:
    loss = STATE_LOSSES[kind](**arguments)
    loss.prepare(LAYERS, TEACHER_LAYERS, WIDTH, teacher_width)
    return loss


def unit(values: Tensor) -> Tensor:
    return values.double() / values.double().norm(dim=-1, keepdim=True)
