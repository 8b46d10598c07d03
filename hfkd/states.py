"""Hidden states of chosen layers, kept while a model runs anyway.

Numbering as in transformers' `hidden_states`: 0 is what enters the first block (the embeddings), l is what block l
puts out, and L, the number of blocks, is the decoder's `last_hidden_state`, behind the final norm. Hooks keep the
tensors and do nothing else, because activation checkpointing may run a block twice; `output_hidden_states` would keep
every layer. Nothing here knows of losses, teachers or labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfkd.errors import StateError
from hfkd.rows import base_model_of


def state_count(model: nn.Module) -> int:
    """The number L of a causal LM's blocks, which is also the number of its last state."""
    return int(base_model_of(model).config.get_text_config().num_hidden_layers)


def state_width(model: nn.Module) -> int:
    """The size H of a causal LM's hidden states."""
    return int(base_model_of(model).config.get_text_config().hidden_size)


def nearest_lists(root: nn.Module, length: int | None) -> list[tuple[str, nn.ModuleList]]:
    """The lists of modules of this length that are nearest to the top, by their names under `root`."""
    found: dict[int, list[tuple[str, nn.ModuleList]]] = {}
    for name, module in root.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == length:
            found.setdefault(name.count("."), []).append((name, module))
    return found[min(found)] if found else []


def block_list(model: nn.Module) -> nn.ModuleList:
    """Find the blocks of the decoder.

    Args:
        model: A causal LM or a PEFT model around one.

    Returns:
        The list of the decoder that is as long as the configuration says; the one nearest to the top where several
        parts have one.

    Raises:
        StateError: There is no such list, or there are several at the same depth.
    """
    base = base_model_of(model)
    count = state_count(model)
    nearest = nearest_lists(base.base_model, count)
    if len(nearest) != 1:
        names = [name for name, _ in nearest] or "none"
        raise StateError(
            f"{type(base).__name__} has {count} blocks by its configuration, and the lists of that length in it are: "
            f"{names}. Expected exactly one nearest to the top, to read hidden states from. Take losses that read "
            "distributions only, or the last layer alone (`layers: last`)."
        )
    return nearest[0][1]


class Recorder:
    """The states of some layers of one model; `recording` makes one.

    Args:
        model: A causal LM or a PEFT model around one.
        layers: Numbers from 0 to L.

    Raises:
        StateError: A layer is out of range, or the model's blocks can't be found.
    """

    def __init__(self, model: nn.Module, layers: Iterable[int]) -> None:
        self.model = model
        self.layers = tuple(sorted(set(layers)))
        self.last = state_count(model) if self.layers else 0
        if wrong := [layer for layer in self.layers if not 0 <= layer <= self.last]:
            raise StateError(
                f"{type(base_model_of(model)).__name__} has the states 0 (embeddings) to {self.last} (behind the last "
                f"block), but {wrong} were asked for. Change the `layers` of the term that names them."
            )
        self._kept: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._graph = False

    def attach(self) -> None:
        """Begin to listen."""
        self._graph = torch.is_grad_enabled()
        inner = [layer for layer in self.layers if layer < self.last]
        blocks = block_list(self.model) if inner else ()
        for layer in inner:
            hook = blocks[layer - 1].register_forward_hook(self._after(layer)) if layer else self._before(blocks[0])
            self._handles.append(hook)

    def detach(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def finish(self, last_hidden_state: Tensor) -> dict[int, Tensor]:
        """Hand out what the latest run of the decoder left.

        Args:
            last_hidden_state: [B, T, H] what this run returned; it is the state of layer L.

        Returns:
            {layer: [B, T, H]} for the layers asked for, on one device, with the gradient that the model gave them.

        Raises:
            StateError: A block didn't run or put out something else, or its state lost the gradient that it should
                carry.
        """
        states = {}
        for layer in self.layers:
            state = last_hidden_state if layer == self.last else self._kept.get(layer)
            shape = None if state is None else tuple(state.shape)
            if shape is None or len(shape) != 3 or shape[:2] != last_hidden_state.shape[:2]:
                raise StateError(
                    f"Layer {layer} of {type(base_model_of(self.model)).__name__} left the shape {shape}; expected "
                    f"{(*last_hidden_state.shape[:2], 'width')} as behind the last block. This architecture's blocks "
                    "don't hand on one state a token: take another layer, or losses that read distributions only."
                )
            self._check_gradient(layer, state)
            states[layer] = state.to(last_hidden_state.device)
        self._kept.clear()
        return states

    def _check_gradient(self, layer: int, state: Tensor) -> None:
        if layer == 0 or state.requires_grad or not self._graph:
            return
        below = block_list(self.model)[:layer]
        if any(parameter.requires_grad for parameter in below.parameters()):
            raise StateError(
                f"The state of layer {layer} carries no gradient, though there are parameters below it that learn. "
                "Reentrant activation checkpointing cuts it. Set "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}` in the training arguments, or '
                "`gradient_checkpointing=False`."
            )

    def _after(self, layer: int) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self._kept[layer] = output[0] if isinstance(output, (tuple, list)) else output

        return keep

    def _before(self, block: nn.Module) -> RemovableHandle:
        def keep(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._kept[0] = inputs[0] if inputs else named.get("hidden_states")

        return block.register_forward_pre_hook(keep, with_kwargs=True)


@contextmanager
def recording(model: nn.Module, layers: Iterable[int]) -> Iterator[Recorder]:
    """Keep the states of some layers while the model's decoder runs inside.

    Where it runs more than once, the latest run counts. Leave the context before the backward pass, and open none for
    the same model inside another.

    Args:
        model: A causal LM or a PEFT model around one.
        layers: Numbers from 0 to L; none puts no hook anywhere.

    Yields:
        The recorder; its `finish(last_hidden_state)`, inside or after the context, gives the states.
    """
    recorder = Recorder(model, layers)
    try:
        recorder.attach()
        yield recorder
    finally:
        recorder.detach()
