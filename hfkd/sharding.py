"""Where a model's weights lie: whole on each process, in shards over the processes, or in CPU memory to be streamed.

Accelerate places the model that learns. A second one, which only speaks, is placed here, in the way the first one is,
so that a teacher that is larger than its student doesn't fill every device with a copy. Knows no teacher and no loss.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState, cpu_offload
from accelerate.utils import DistributedType, str_to_bool
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from hfkd.distributed import largest_and_smallest
from hfkd.rows import base_model_of, kind_of
from hfkd.zero import has_engine, is_partitioned, shard_for_inference, zero_stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """How a run was started, as far as a second model has to know it. `accelerate.Accelerator` has the same names.

    Args:
        device: This process's.
        num_processes: Of the whole run.
        is_fsdp2: Whether the student's weights will be sharded with `fully_shard`.
        is_zero3: Whether DeepSpeed will cut them. A second model then waits as it was loaded: its engine needs the
            accelerator.
    """

    device: torch.device
    num_processes: int = 1
    is_fsdp2: bool = False
    is_zero3: bool = False

    @classmethod
    def of(cls, args: Any) -> Launch:
        """Before Trainer has made its accelerator: from the training arguments and what `accelerate launch` set.

        Args:
            args: `TrainingArguments`.
        """
        device, state = args.device, PartialState()  # in this order: asking for the device makes the state
        plugin = getattr(args, "fsdp_plugin_args", None)
        if plugin is not None:
            sharded = int(plugin.get("fsdp_version", 2)) == 2
        else:
            wanted = bool(str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))
            sharded = wanted and os.environ.get("FSDP_VERSION", "1") == "2"
        stage = getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", 0)
        return cls(device, state.num_processes, sharded and state.num_processes > 1, int(stage or 0) == 3)


@dataclass(frozen=True)
class Placement:
    """What one process holds of a model.

    Args:
        kind: `whole`, `fsdp2`, `zero3` or `streamed` (whole, in CPU memory, a layer at a time on the device).
        shards: Into how many parts the weights are cut.
        bytes_here: Bytes of weights and buffers on this process.
        bytes_whole: Bytes of the whole model.
        device: Where most of the bytes here lie: `cpu` where they wait for their turn on the process's device.
    """

    kind: str
    shards: int
    bytes_here: int
    bytes_whole: int
    device: str

    @classmethod
    def of(cls, model: nn.Module) -> Placement:
        """Look at the weights themselves, not at what was asked for.

        Args:
            model: Wrapped or not.
        """
        here, whole, kind, shards = Counter[str](), 0, "whole", 1
        offloaded = {id(weight) for weight in _offloaded(model)}
        for weight in [*model.parameters(), *model.buffers(), *_offloaded(model)]:
            if weight.device.type == "meta" and id(weight) not in offloaded:
                continue  # its values are in the map of an offloading hook
            if isinstance(weight, DTensor):
                kind, shards = "fsdp2", max(shards, weight.device_mesh.size())
                here[str(weight.to_local().device)] += _size(weight.to_local())
            elif is_partitioned(weight):
                kind, shards = "zero3", max(shards, PartialState().num_processes)
                here[str(weight.ds_tensor.device)] += weight.ds_tensor.numel() * weight.element_size()
                whole += weight.ds_numel * weight.element_size()
                continue
            else:
                here[str(weight.device)] += _size(weight)
            whole += _size(weight)
        device = here.most_common(1)[0][0] if here else "none"
        return cls("streamed" if offloaded else kind, shards, here.total(), whole, device)


def place(model: nn.Module, launch: Any, offload: bool = False) -> nn.Module:
    """Put a frozen model where it can speak: in shards where the student is sharded, else whole on the device.

    Args:
        model: A causal LM of transformers, perhaps with an adapter; changed in place. It mustn't learn.
        launch: A `Launch`, or the trainer's accelerator.
        offload: Keep the weights (or this process's shards of them) in CPU memory and bring them to the device a layer
            at a time: slower, and the device holds little more than one layer and the head.

    Returns:
        What its forward must be entered through, so that its weights are gathered: the model itself, or a wrapper.

    Raises:
        ValueError: It is to be sharded, and its layers can't be found or its weights can't be cut.
    """
    if getattr(launch, "is_zero3", False):
        return model
    if Placement.of(model).kind != "whole" and (zero_stage(launch) != 3 or has_engine(model)):
        return model  # it has its place already; loaded in ZeRO-3's shards it still lacks what gathers them
    if getattr(launch, "is_fsdp2", False) and launch.num_processes > 1:
        _shard(model, launch.device, launch.num_processes, offload)
    elif zero_stage(launch) == 3:
        return shard_for_inference(model, launch, offload)
    elif offload:
        _stream(model, launch.device)
    else:
        model.to(launch.device)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers that are gathered one at a time: those that the architecture says mustn't be split.

    Args:
        model: A causal LM, perhaps with an adapter.

    Raises:
        ValueError: It names none, or there are none of that name.
    """
    base = base_model_of(model)
    names = set(getattr(base, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if kind_of(module).__name__ in names]
    if not found:
        raise ValueError(
            f"{type(base).__name__} can't be sharded: its layers can't be found (`_no_split_modules` is "
            f"{sorted(names) or None}, and no module is of such a class). Set `model._no_split_modules` to the name "
            "of the class of its layers, or launch without FSDP."
        )
    return found


def ends_share_behind_a_copy(base: nn.Module) -> bool:
    """Whether PEFT keeps a copy of the embeddings or of the head (`modules_to_save`), and what it is a copy of is
    shared by both: such weights can't be cut in two groups.

    Args:
        base: A causal LM, PEFT's wrapper taken off.
    """
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    own = [getattr(end, "original_module", end) for end in ends if end is not None]
    return len(own) == 2 and own != ends and own[0].weight is own[1].weight


def is_sharded(model: nn.Module) -> bool:
    """Whether processes must run the model together, because each holds a part of its weights only."""
    return any(isinstance(weight, DTensor) or is_partitioned(weight) for weight in model.parameters())


@contextmanager
def own_names(model: nn.Module) -> Iterator[None]:
    """Take the wrappers of FSDP's activation checkpointing out of the way while names of weights are read: peft looks
    for them under the names that the model had, finds none and writes an adapter without weights (peft 0.21).

    Args:
        model: Must not be run inside.
    """
    wrappers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, CheckpointWrapper)
    ]
    for parent, name, child in wrappers:
        parent._modules[name] = child._checkpoint_wrapped_module
    try:
        yield
    finally:
        for parent, name, child in wrappers:
            parent._modules[name] = child


@contextmanager
def one_process_at_a_time(launch: Any) -> Iterator[None]:
    """Let the processes of a machine take turns, where each needs much memory for a moment: a model that is sharded
    is read whole first.

    Args:
        launch: A `Launch`, or the trainer's accelerator; without shards nobody waits.
    """
    if not getattr(launch, "is_fsdp2", False):
        yield
        return
    state = PartialState()
    # Machines may have different numbers of them, and whoever waits once less than the others waits for ever.
    turns = largest_and_smallest(int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)))[0]
    for _ in range(state.local_process_index):
        state.wait_for_everyone()
    try:
        yield
    finally:
        for _ in range(turns - state.local_process_index):
            state.wait_for_everyone()


def _shard(model: nn.Module, device: torch.device, processes: int, offload: bool) -> None:
    """One group for each layer and one for the rest; all are freed after their forward, the root's too."""
    _refuse_unshardable(model)
    mesh = init_device_mesh(device.type, (processes,))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for block in blocks_of(model):
        fully_shard(block, **options)
    base = base_model_of(model)
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or (embeddings.weight is not head.weight and not ends_share_behind_a_copy(base)):
        fully_shard(embeddings, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "generate")


def _refuse_unshardable(model: nn.Module) -> None:
    weights = [name for name, weight in model.named_parameters() if not weight.is_floating_point()]
    if getattr(base_model_of(model), "is_quantized", False) or weights:
        raise ValueError(
            f"{type(base_model_of(model)).__name__} is quantised, and quantised weights can't be cut into shards. "
            "Load it in bfloat16 (`dtype: bfloat16`, without a quantization_config), or launch without FSDP."
        )
    if getattr(base_model_of(model), "hf_device_map", None):
        raise ValueError(
            f"{type(base_model_of(model)).__name__} was dispatched with a device_map, and is to be sharded over the "
            "processes as well. Leave device_map out."
        )


def _stream(model: nn.Module, device: torch.device) -> None:
    """All but the head in CPU memory, with hooks that bring each layer to the device."""
    base = base_model_of(model)
    head = base.get_output_embeddings()
    if head.weight is base.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    head.to(device)
    cpu_offload(base.base_model, execution_device=device)


def _offloaded(model: nn.Module) -> list[Tensor]:
    """The weights that offloading hooks keep elsewhere, each once."""
    kept: dict[int, Tensor] = {}
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            values = getattr(one, "weights_map", None)
            if values is not None:
                named = getattr(values, "dataset", values)
                kept.update((weight.data_ptr(), weight) for weight in named.values())
    return list(kept.values())


def _size(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()


def fsdp_version(accelerator: Any) -> int | None:
    """Which FSDP an accelerator runs, None for none."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return None
    return int(accelerator.state.fsdp_plugin.fsdp_version)
