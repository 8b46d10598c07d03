"""Which term wins: the gradient of each by itself, on request.

It takes one more backward pass a term, on one micro-batch of the steps that are logged, and changes no gradient that
is trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainingArguments

from hfkd.objective import Objective


def check_gradients_can_be_told_apart(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Refuse set-ups whose gradients exist only inside their own backward pass.

    Raises:
        ValueError: The student is sharded, or its activations are checkpointed in the reentrant way.
    """
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "log_gradient_norms is on, but reentrant activation checkpointing knows only one backward pass. Set "
            '`gradient_checkpointing_kwargs={"use_reentrant": False}`, or switch one of the two off.'
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"log_gradient_norms is on, but under {accelerator.distributed_type.value} gradients can't be taken term "
            "by term. Switch it off, or measure on one process or under DDP first."
        )


def norms_by_term(
    objective: Objective,
    module: nn.Module,
    rows: tuple[Any, ...],
    states: Mapping[int, Tensor],
    own_text: bool = False,
    private: Tensor | None = None,
) -> dict[str, float]:
    """Measure the gradient of each weighted term.

    Args:
        objective: The terms, with their weights in force.
        module: The student, whose graph `rows` and `states` hang in.
        rows: The first arguments of the objective: student, signal, targets, weights, layout.
        states: The student's states.
        own_text: Whether the student wrote the text, which terms that learn it are then left out of.
        private: [N] how private each token is, or None.

    Returns:
        For each term the L2 norm of d(weight * mean over this micro-batch's tokens) / d(the student's parameters that
        learn); 0 for a term of weight 0, for one that is left out and for one that reaches none of them.
    """
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    tokens = max(1, len(rows[0]))
    norms = {}
    for term in objective.terms:
        if not term.weight or (own_text and term.loss.learns_text):
            norms[term.name] = 0.0
            continue
        total = objective.alone(term.name)(*rows, states=states, private=private).total
        if not total.requires_grad:
            norms[term.name] = 0.0  # nothing that learns is reached
            continue
        found = torch.autograd.grad(total, learned, retain_graph=True, allow_unused=True)
        norms[term.name] = float(torch.nn.utils.get_total_norm([one for one in found if one is not None])) / tokens
    return norms
