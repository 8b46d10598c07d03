"""What has to be done differently because a model is wrapped, sharded or run by several processes.

Gradient synchronisation (DDP) and parameter gathering (FSDP, ZeRO-3) are armed by the wrapped model's own forward.
Work that needs them, such as a backbone without its head followed by a loss, is therefore run *inside* that forward.
This module knows nothing of losses or teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def run_inside(wrapped: nn.Module, module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` in the place of `module.forward`, from within the wrapped model's forward.

    Args:
        wrapped: What Accelerate made of the model (DDP, FSDP, DeepSpeed engine), or the model itself.
        module: The model inside `wrapped`.
        function: What to run there; it may call `module` again (the original forward is back by then).
        *args: Arguments of `function`.

    Returns:
        What `function` returned.
    """
    if wrapped is module and not isinstance(module, FSDPModule):
        return function(*args)
    original = module.__dict__.get("forward")

    def restore() -> None:
        if original is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = original

    def redirected(*inner: Any, **_: Any) -> Any:
        restore()
        return function(*inner)

    module.__dict__["forward"] = redirected
    try:
        return wrapped(*args)
    finally:
        restore()


def total_over_processes(count: float | Sequence[float], device: torch.device) -> Tensor:
    """Sum a number, or several at once, over all processes.

    Args:
        count: This process's number or numbers.
        device: Where the collective runs.

    Returns:
        Of the shape of `count`, float64 (float32 on devices without float64), the same on every process.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = torch.tensor(count, dtype=dtype, device=device)
    if PartialState().num_processes > 1:
        torch.distributed.all_reduce(total)
    return total


def largest_and_smallest(number: int) -> tuple[int, int]:
    """The largest and the smallest of the processes' numbers, for what they must agree on.

    Args:
        number: This process's.
    """
    state = PartialState()
    if state.num_processes == 1:
        return number, number
    both = torch.tensor([number, -number], device=state.device)
    torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
    return int(both[0]), -int(both[1])


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that no wrapper looks after (those that losses hold) over all processes.

    Args:
        parameters: The same on every process; one without a gradient here counts as zero.
    """
    processes = PartialState().num_processes
    if processes == 1:
        return
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= processes


def same_everywhere(parameters: Iterable[nn.Parameter]) -> None:
    """Give all processes the first one's values of parameters that no wrapper looks after.

    Args:
        parameters: Of the same shapes on every process.
    """
    if PartialState().num_processes > 1:
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, src=0)


def is_main_process() -> bool:
    """Whether this process may print and write."""
    return PartialState().is_main_process
