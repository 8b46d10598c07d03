"""A token prefix that many prompts share, run through a frozen model once.

Prompts with the same demonstrations begin with the same tokens. `SharedPrefix` keeps the keys and values of those
tokens for one model and hands them out expanded to a batch, without a copy; what is left of each row is then run
behind them. It knows nothing of prompts or teachers: who changes the weights (or switches an adapter) calls
`invalidate`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from hfkd.batch import IGNORE, View
from hfkd.errors import UnsupportedCache
from hfkd.rows import base_model_of, decode, input_device

_EXPANDABLE = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


def common_prefix(sequences: Iterable[Sequence[int]], limit: int | None = None) -> list[int]:
    """Find the longest run of tokens that all sequences begin with.

    Args:
        sequences: Token ids, one sequence each.
        limit: The longest prefix wanted, in tokens; None means no limit.

    Returns:
        The shared tokens; empty where there is no sequence or nothing is shared.
    """
    prefix: list[int] | None = None
    for sequence in sequences:
        if prefix is None:
            prefix = list(sequence[:limit])
            continue
        length = 0
        for ours, theirs in zip(prefix, sequence, strict=False):
            if ours != theirs:
                break
            length += 1
        del prefix[length:]
        if not prefix:
            break
    return prefix or []


class SharedPrefix:
    """Keys and values of one token prefix for one model, computed once and expanded to any batch size.

    Args:
        ids: The tokens of the prefix.
    """

    MINIMUM = 32
    """Below so many tokens the bookkeeping costs more than the reuse saves."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self._cache: Cache | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def invalidate(self) -> None:
        """Forget the keys and values, because the weights that made them have changed."""
        self._cache = None

    def cache_for(self, model: PreTrainedModel, batch_size: int) -> Cache:
        """Return the prefix's keys and values for `batch_size` rows, ready to be extended.

        Args:
            model: The model (or PEFT model) whose weights are in force; its mode should be eval.
            batch_size: Rows of the batch that follows.

        Raises:
            UnsupportedCache: The architecture keeps a state that can't be shared between rows.
        """
        if self._cache is None:
            self._cache = self._run(model)
        expanded = copy.copy(self._cache)
        expanded.layers = [_expand(layer, batch_size) for layer in self._cache.layers]
        return expanded

    def _run(self, model: PreTrainedModel) -> Cache:
        if kinds := _length_dependent(model):
            raise UnsupportedCache(
                f"The rotary embedding of {type(model).__name__} is of type {sorted(kinds)}: its frequencies depend "
                f"on the "
                "length of the whole row, so a prefix that was run alone differs. Every prompt is run whole instead."
            )
        ids = torch.tensor([self.ids], dtype=torch.long, device=input_device(model))
        with torch.no_grad():
            output = decode(model, ids, torch.ones_like(ids), use_cache=True)
        cache = getattr(output, "past_key_values", None)
        layers = getattr(cache, "layers", None)
        if not layers or not all(type(layer) in _EXPANDABLE for layer in layers):
            kinds = (
                sorted({type(layer).__name__ for layer in layers or []})
                or "no keys and values that a prefix could keep"
            )
            raise UnsupportedCache(
                f"The cache of {type(model).__name__} holds {kinds}; a shared prefix needs plain attention caches "
                f"({[kind.__name__ for kind in _EXPANDABLE]}). Every prompt is run whole instead."
            )
        return cache

    def rest_of(self, view: View) -> View | None:
        """Cut the prefix off every row and pad what is left on the right.

        Args:
            view: [B, T] rows, padded on either side.

        Returns:
            The rows behind the prefix, or None where some row doesn't begin with it, or learns a token that the prefix
            itself predicts.
        """
        size = len(self.ids)
        lengths = view.attention_mask.sum(dim=-1)
        if size == 0 or int(lengths.min()) <= size:
            return None
        start = view.attention_mask.long().argmax(dim=-1, keepdim=True)
        steps = torch.arange(int(lengths.max()), device=start.device)
        where = (start + steps).clamp(max=view.input_ids.shape[1] - 1)
        ids, labels = view.input_ids.gather(1, where), view.labels.gather(1, where)
        real = steps < lengths[:, None]
        wanted = torch.tensor(self.ids, device=ids.device)
        if not bool((ids[:, :size] == wanted).all()) or bool((labels[:, : size + 1] != IGNORE).any()):
            return None
        return View(
            ids[:, size:], real[:, size:].to(view.attention_mask.dtype), labels[:, size:].where(real[:, size:], IGNORE)
        )

    def decode_rest(self, model: PreTrainedModel, rest: View) -> Tensor:
        """Run the rows behind the prefix.

        Args:
            model: The model whose weights are in force.
            rest: What `rest_of` returned, [B, R].

        Returns:
            [B, R, H] last hidden states.
        """
        batch_size = rest.input_ids.shape[0]
        past = self.cache_for(model, batch_size)
        mask = torch.cat([rest.attention_mask.new_ones(batch_size, len(self.ids)), rest.attention_mask], dim=-1)
        positions = rest.position_ids + len(self.ids)
        return decode(model, rest.input_ids, mask, positions, past=past, use_cache=True).last_hidden_state


def _length_dependent(model: PreTrainedModel) -> set[str]:
    """The types of rotary embedding in the configuration whose frequencies change with the length of the input."""
    config = base_model_of(model).config.get_text_config()
    rules = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    layers = [rules, *(value for value in rules.values() if isinstance(value, dict))]
    return {str(layer.get("rope_type", layer.get("type"))) for layer in layers} & {"dynamic", "longrope"}


def _expand(layer: DynamicLayer, batch_size: int) -> DynamicLayer:
    """A layer whose keys and values are views on the one row that was computed; `update` replaces them, it never
    writes into them.
    """
    expanded = copy.copy(layer)
    if layer.keys is not None:
        expanded.keys = layer.keys.expand(batch_size, *layer.keys.shape[1:])
        expanded.values = layer.values.expand(batch_size, *layer.values.shape[1:])
    return expanded
