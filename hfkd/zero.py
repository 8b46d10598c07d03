"""What DeepSpeed's ZeRO-3 asks for: a parameter read outside its module's forward, and an engine for a second model.

Under ZeRO-3 a parameter is empty except while its own module runs. The objective reads the output head outside of it,
once for each micro-batch, and a teacher is run by parts (decoder, then head), never through an optimizer. DeepSpeed is
no dependency: it's imported only when a parameter of its kind, or a run that it drives, is at hand. Knows no teacher
and no loss.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn


def zero_stage(accelerator: Any) -> int:
    """Which stage of ZeRO drives the run: 0 where DeepSpeed doesn't."""
    if getattr(accelerator, "distributed_type", None) != DistributedType.DEEPSPEED:
        return 0
    return int(accelerator.state.deepspeed_plugin.zero_stage)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether a parameter is ZeRO-3's: empty here, except while its own module runs."""
    return hasattr(parameter, "ds_id")


def whole(parameter: nn.Parameter) -> Tensor:
    """Gather a partitioned parameter; all processes must ask for it together.

    Args:
        parameter: Partitioned or not.

    Returns:
        The whole values, in the graph: what flows back to them reaches the parameter, and is reduced with the other
        gradients. They are kept in memory as long as somebody holds them, whereas the parameter is empty again.
    """
    if not is_partitioned(parameter):
        return parameter
    if parameter.ds_status.name == "AVAILABLE":
        # Within the engine's forward DeepSpeed gathers what is read, and frees it at the end of that forward.
        return _Gathered.apply(parameter)
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        # The result has its own hold on the storage; DeepSpeed gives the parameter another one and leaves this be.
        return _Gathered.apply(parameter)


class _Gathered(torch.autograd.Function):
    """The parameter's values as they are now; the parameter is empty again when their gradient comes."""

    @staticmethod
    def forward(ctx, parameter: nn.Parameter) -> Tensor:
        ctx.parameter = parameter
        return parameter.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        parameter = ctx.parameter
        if parameter.numel() == gradient.numel():
            return gradient
        # Torch takes a gradient for a parameter of its shape only. One number stands for all: nobody reads them.
        parameter.data = gradient.new_zeros(1, dtype=parameter.dtype).expand(gradient.shape)

        def empty(parameter: nn.Parameter) -> None:
            handle.remove()
            if parameter.ds_status.name == "NOT_AVAILABLE":
                parameter.data = parameter.new_empty(0)

        handle = parameter.register_post_accumulate_grad_hook(empty)
        return gradient


def has_engine(model: nn.Module) -> bool:
    """Whether DeepSpeed's hooks are on a model's modules, so that they gather their own weights; weights that were
    loaded in shards alone don't.
    """
    return "ds_id" in model.__dict__


def row_count(weight: Tensor) -> int:
    """The number of rows of a matrix, also of one that is empty here."""
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def inference_config(config: Mapping[str, Any], hidden_size: int | None) -> dict[str, Any]:
    """The run's DeepSpeed configuration, made fit for a model that only speaks.

    Args:
        config: What drives the student, stage 3; it isn't changed.
        hidden_size: Of the model that speaks, which isn't the student's; None leaves the sizes that depend on it to
            DeepSpeed.

    Returns:
        A configuration without optimizer, scheduler and what belongs to them, with parameters in shards.
    """
    # DeepSpeed would build an optimizer over frozen weights from these, and stop.
    training_only = ("optimizer", "scheduler", "gradient_clipping", "gradient_accumulation_steps")
    made = {key: copy.deepcopy(value) for key, value in config.items() if key not in training_only}
    zero = {key: value for key, value in made["zero_optimization"].items() if value != "auto"}
    zero.pop("offload_optimizer", None)
    if hidden_size is not None:
        zero |= {
            "reduce_bucket_size": hidden_size * hidden_size,
            "stage3_param_persistence_threshold": 10 * hidden_size,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        }
    # An engine wants a batch size, though none is ever counted here.
    sizes = {"train_batch_size", "train_micro_batch_size_per_gpu"}
    made = {key: value for key, value in made.items() if key not in sizes and value != "auto"}
    return {**made, "zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}


def shard_for_inference(model: nn.Module, accelerator: Any, offload: bool = False) -> nn.Module:
    """Give a frozen model its own ZeRO-3 engine, so that each process holds its share of the weights.

    The model's own modules gather their weights from then on, whether they are called through the engine or not.

    Args:
        model: A causal LM of transformers that doesn't learn, whole or loaded in shards already.
        accelerator: The student's, driven by ZeRO-3.
        offload: Keep the shards in CPU memory, and bring each layer to the device when it is run.

    Returns:
        The engine; hold on to it as long as the model is used.
    """
    import deepspeed

    config = inference_config(accelerator.state.deepspeed_plugin.deepspeed_config, _hidden_size(model))
    if offload:
        pinned = accelerator.device.type == "cuda"
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    engine = deepspeed.initialize(model=model.requires_grad_(False), config=config)[0]
    engine.eval()
    return engine


def _hidden_size(model: nn.Module) -> int | None:
    return getattr(model.config.get_text_config(), "hidden_size", None)
