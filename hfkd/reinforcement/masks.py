"""Which of the student's answers a teacher teaches, by their reward: all, the wrong ones, or those to prompts that
were never answered right. Arithmetic alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLACES = ("everywhere", "wrong_responses", "wrong_groups")
"""The names of the rules."""


def taught_responses(rewards: Tensor, where: str, group: int, right_from: float = 1.0) -> Tensor:
    """Say which answers are taught.

    Args:
        rewards: [N] of all answers, those to one prompt side by side.
        where: `everywhere`; `wrong_responses`, the answers that aren't right; `wrong_groups`, the answers to prompts
            of which no answer is right.
        group: How many answers a prompt has.
        right_from: The least reward of a right answer.

    Returns:
        [N] booleans.

    Raises:
        ValueError: There is no such rule.
    """
    wrong = rewards < right_from
    if where == "everywhere":
        return torch.ones_like(wrong)
    if where == "wrong_responses":
        return wrong
    if where == "wrong_groups":
        return wrong.view(-1, group).all(dim=1).repeat_interleave(group)
    raise ValueError(f"distil_where is {where!r}; expected one of {', '.join(PLACES)}")
