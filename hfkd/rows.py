"""Rows: what a model says about the supervised tokens, and the only causal shift of the project.

`supervised` drops every position whose prediction is not learned, before anything reaches the output head. `Head` is
that output head, read out of a model once, so that logits are made chunk by chunk and never as a [B, T, V] tensor.
`DenseRows` and `TopKRows` are the two forms that a distribution over the vocabulary takes on its way to a loss.
Nothing here knows about losses, teachers or prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from transformers import Cache, PreTrainedModel

from hfkd.batch import predicted
from hfkd.errors import HeadError
from hfkd.zero import is_partitioned, row_count, whole

LOWEST = -1e4
"""Stands for a logit of minus infinity: its probability is exactly 0, and products with it stay finite."""


def supervised(states: Tensor, labels: Tensor) -> Tensor:
    """Keep the positions whose next token is learned.

    Args:
        states: [B, T, ...] one entry a position: hidden states, say.
        labels: [B, T] token ids, -100 where nothing is learned.

    Returns:
        [N, ...] the entries at position t for which `labels[:, t + 1]` is learned, row by row.
    """
    return states[:, :-1][predicted(labels)]


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """Take PEFT's wrapper off; its adapter layers stay in place inside.

    Raises:
        HeadError: The adapter adds virtual tokens (prompt tuning), which a call below the wrapper would skip.
    """
    configs = getattr(model, "peft_config", None)
    if configs is None or not hasattr(model, "get_base_model"):
        return model
    if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        raise HeadError(
            f"The adapter is of type {[config.peft_type for config in configs.values()]}, which adds virtual tokens "
            f"to the prompt. Expected "
            "an adapter that changes layers (LoRA and its kin). Choose another `peft_config`, or train the full model."
        )
    return model.get_base_model()


def input_device(model: nn.Module) -> torch.device:
    """Where a model reads its ids: an offloaded embedding says where it is run, and one in shards, which may wait in
    CPU memory, is gathered on the process's own device.
    """
    embeddings = base_model_of(model).get_input_embeddings()
    if isinstance(embeddings.weight, DTensor) or is_partitioned(embeddings.weight):
        return PartialState().device
    if embeddings.weight.device.type != "meta":
        return embeddings.weight.device
    return torch.device(embeddings._hf_hook.execution_device)


def position_count(model: nn.Module) -> int | None:
    """How many positions a model was made for; None where its configuration doesn't say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def decode(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    past: Cache | None = None,
    use_cache: bool = False,
    segments: Mapping[str, Any] | None = None,
) -> Any:
    """Run the part of a causal LM that comes before its output head.

    Args:
        model: A causal LM or a PEFT model around one.
        input_ids: [B, T] token ids.
        attention_mask: [B, P + T] mask, the cached tokens included; what the attention reads where there are segments.
        position_ids: [B, T] positions; passed on where the architecture takes them.
        past: Cached keys and values of P tokens.
        use_cache: Whether to return a cache.
        segments: For the attention: where the sequences of a flat row begin (see `hfkd.packing`).

    Returns:
        The decoder's output with `last_hidden_state` [B, T, H].
    """
    base = base_model_of(model)
    decoder = base.base_model
    if decoder is base:
        raise HeadError(
            f"{type(base).__name__} has no part below its output head that can be run alone (`base_model_prefix` is "
            f"{base.base_model_prefix!r}). Expected a causal LM of transformers, loaded with `AutoModelForCausalLM`."
        )
    extra: dict[str, Any] = dict(segments or {})
    if position_ids is not None and "position_ids" in inspect.signature(decoder.forward).parameters:
        extra["position_ids"] = position_ids
    return decoder(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=past,
        use_cache=use_cache,
        return_dict=True,
        **extra,
    )


@dataclass(frozen=True)
class Head:
    """An output head: `logits = cap(scale * (hidden @ weight.T + bias))`, where `cap(x) = soft_cap * tanh(x /
    soft_cap)`.

    Args:
        weight: [V, H].
        bias: [V] or None.
        scale: Factor on the logits (Cohere, Granite, Falcon-H1, MiniCPM3, HyperCLOVA X).
        soft_cap: Bound of the logits (Gemma), None for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def vocab_size(self) -> int:
        """The number V of ids that the head scores, padding included."""
        return self.weight.shape[0]

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """Read the head of a causal LM.

        Args:
            model: A causal LM or a PEFT model around one.

        Raises:
            HeadError: The head is adapted, quantised or not a plain linear layer, so its weight is not what the model
                multiplies with.
        """
        base = base_model_of(model)
        layer = _active(base.get_output_embeddings())
        if kind_of(layer) is not nn.Linear:
            raise HeadError(_not_linear(base, layer))
        if not layer.weight.is_floating_point():
            raise HeadError(
                f"The output head of {type(base).__name__} is quantised ({layer.weight.dtype}). Expected floating "
                f"point weights. Keep the "
                "head out of the quantisation: `llm_int8_skip_modules=['lm_head']` in its quantization config."
            )
        scale, soft_cap = _logit_rules(base.config.get_text_config())
        return cls(_whole(layer.weight), None if layer.bias is None else _whole(layer.bias), scale, soft_cap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Score the vocabulary.

        Args:
            hidden: [n, H] last hidden states.

        Returns:
            [n, V] logits in the dtype of the product.
        """
        return self.finish(nn.functional.linear(hidden.to(self.weight.dtype), self.weight))

    def finish(self, product: Tensor) -> Tensor:
        """Turn `hidden @ weight.T` into logits: bias, scale and soft cap, each only where there is one."""
        if self.bias is not None:
            product = product + self.bias.clamp(min=LOWEST).to(product.dtype)
        if self.scale != 1.0:
            product = product * self.scale
        if self.soft_cap is not None:
            product = self.soft_cap * torch.tanh(product / self.soft_cap)
        return product

    def first(self, vocab_size: int) -> Head:
        """The head over the first `vocab_size` ids only (padded vocabularies of one family differ in their tails)."""
        if vocab_size >= self.vocab_size:
            return self
        return replace(
            self, weight=self.weight[:vocab_size], bias=None if self.bias is None else self.bias[:vocab_size]
        )

    def detached(self) -> Head:
        """The same head outside the graph."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def copy(self) -> Head:
        """The same head in memory of its own, for when the model's is about to be freed."""
        return replace(self, weight=self.weight.clone(), bias=None if self.bias is None else self.bias.clone())

    def check(self, hidden: Tensor, logits: Tensor) -> None:
        """Refuse a head that doesn't reproduce the model's own logits.

        Args:
            hidden: [n, H] last hidden states of some positions.
            logits: [n, V] what the model's own forward says of them.

        Raises:
            HeadError: They differ by more than the dtype's rounding: the model changes its logits in a way that is not
                known here.
        """
        ours, theirs = self.logits(hidden).float(), logits.float()
        tolerance = 1e-4 if logits.dtype == torch.float32 else 3e-2
        same = ours.shape == theirs.shape
        worst = (ours - theirs).abs().max().item() if same else float("inf")
        # Written so that a difference that is not a number is refused too.
        if not worst <= tolerance * max(1.0, theirs.abs().max().item()):
            raise HeadError(
                f"The logits rebuilt from the output head differ from the model's own by {worst:.3g} (largest logit "
                f"{theirs.abs().max().item():.3g}). Known are a bias, a scale (logit_scale, logits_scaling, "
                f"lm_head_multiplier, "
                "output_multiplier) and a soft cap (final_logit_softcapping). This architecture does something else "
                "to its logits: please report it."
            )


def head_size(model: nn.Module) -> int:
    """The number of ids that a causal LM's head scores, padding included; gathers nothing, so that a process may ask
    alone.
    """
    return row_count(_active(base_model_of(model).get_output_embeddings()).weight)


def _active(layer: nn.Module | None) -> nn.Module | None:
    """The module in force behind PEFT's `modules_to_save`: a trained copy of the head, or the original where the
    adapter is off.
    """
    if layer is None or not hasattr(layer, "modules_to_save"):
        return layer
    if layer.disable_adapters or not layer.active_adapters:
        return layer.original_module
    return layer.modules_to_save[layer.active_adapters[0]]


def kind_of(layer: nn.Module | None) -> type:
    """The class of a layer itself; `fully_shard` puts one of its own before it."""
    return type(layer).__bases__[1] if isinstance(layer, FSDPModule) else type(layer)


def _not_linear(base: nn.Module, layer: nn.Module | None) -> str:
    kind = "nothing" if layer is None else f"{type(layer).__module__}.{type(layer).__name__}"
    text = f"The output head of {type(base).__name__} is {kind}; expected a plain torch.nn.Linear. "
    if hasattr(layer, "lora_A") or "peft" in kind:
        return text + (
            "An adapter on the head would be bypassed, because the objective multiplies with the head's weight "
            "itself: "
            "take `lm_head` out of `target_modules`, or train it whole with `modules_to_save: [lm_head]`."
        )
    return text + (
        "A quantised head can't be read as a matrix: keep `lm_head` out of the quantisation "
        "(`llm_int8_skip_modules=['lm_head']`)."
    )


def _whole(parameter: Tensor) -> Tensor:
    """A sharded parameter gathered once; a plain one as it is. The gradient of the gathered one is of this process's
    rows alone, so its backward averages over the processes, as FSDP does; left to itself, torch takes it to be the
    same everywhere and keeps each process's part of its own.
    """
    if isinstance(parameter, DTensor):
        return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return whole(parameter)


def _logit_rules(config: Any) -> tuple[float, float | None]:
    """The factor and the bound that an architecture puts on its logits, from its configuration."""
    soft_cap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)):
            return float(value), soft_cap
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        return (float(scaling) if config.model_type == "hyperclovax" else 1.0 / scaling), soft_cap
    return 1.0, soft_cap


def product(states: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """`states @ weight.T` in the first rows of a buffer that may be wider in type."""
    out = buffer[: states.shape[0]]
    if states.dtype == buffer.dtype:
        return torch.mm(states, weight.T, out=out)
    if states.device.type == "cuda":
        return torch.mm(states, weight.T, out_dtype=buffer.dtype, out=out)  # summed and kept in float32
    return out.copy_(torch.mm(states, weight.T))


@dataclass(frozen=True)
class DenseRows:
    """Distributions over the whole vocabulary, kept as hidden states: logits are made only when a chunk asks for them.

    Args:
        hidden: [N, H] last hidden states of the supervised positions.
        head: The output head of the model that made them.
    """

    hidden: Tensor
    head: Head

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocab_size(self) -> int:
        """The number V of ids."""
        return self.head.vocab_size

    def first(self, vocab_size: int) -> DenseRows:
        """The same rows over the first `vocab_size` ids only."""
        return replace(self, head=self.head.first(vocab_size))

    def detached(self) -> DenseRows:
        """The same rows outside the graph, the head in the dtype of the hidden states."""
        states, head = self.hidden.detach(), self.head.detached()
        return DenseRows(states, replace(head, weight=head.weight.to(states.dtype)))

    def products(self, which: Tensor | slice, buffer: Tensor) -> Tensor:
        """[c, V] `hidden @ weight.T` of some rows, in the first rows of a buffer that may be wider in type."""
        return product(self.hidden[which], self.head.weight, buffer)

    def logits(self, which: Tensor | slice, buffer: Tensor) -> Tensor:
        """[c, V] logits of some rows; the buffer [>= c, V] may be used for them."""
        return self.head.finish(self.products(which, buffer))


@dataclass(frozen=True)
class TopKRows:
    """The K likeliest tokens of each row with their true log-probabilities; what is left of the mass is one tail
    bucket.

    Args:
        ids: [N, K] token ids, distinct within a row.
        log_probs: [N, K] log-probabilities (nats) of the whole distribution, not renormalised over K.
        vocab_size: The number V of ids that the distribution was taken over.
        temperature: The temperature that the distribution was taken at.
        tail: [N] log-probability (nats) of all other ids together; None takes what `log_probs` leave of 1, which
            rounded ones can't tell exactly.
    """

    ids: Tensor
    log_probs: Tensor
    vocab_size: int
    temperature: float = 1.0
    tail: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def select(self, which: Tensor | slice) -> TopKRows:
        """Some of the rows."""
        tail = None if self.tail is None else self.tail[which]
        return replace(self, ids=self.ids[which], log_probs=self.log_probs[which], tail=tail)


@dataclass(frozen=True)
class RowLayout:
    """Where N supervised rows come from, for losses that compare rows with each other.

    Args:
        sequence: [N] the row of the batch that each token belongs to.
        position: [N] its place among the supervised tokens of that sequence, from 0.
        targets: [N] the ids that the tokens really have; None where nobody asked.
        spans: [N] the number of the stretch of text that each token belongs to, where the teacher cuts the text into
            other tokens; else None.
    """

    sequence: Tensor
    position: Tensor
    targets: Tensor | None = None
    spans: Tensor | None = None

    def __len__(self) -> int:
        return self.sequence.shape[0]

    @classmethod
    def of(cls, labels: Tensor) -> RowLayout:
        """Read the layout off labels [B, T]."""
        marks = predicted(labels)
        return cls(marks.nonzero()[:, 0], (marks.long().cumsum(dim=-1) - 1)[marks])

    @classmethod
    def single(cls, rows: int, device: torch.device) -> RowLayout:
        """All rows as one sequence."""
        return cls(torch.zeros(rows, dtype=torch.long, device=device), torch.arange(rows, device=device))
