"""Padding-free runs: the sequences of a batch laid end to end in one row, so that no padding is computed.

`drop_padding` prepares a model once, `run_view` runs a view padded or flat, and `check_segments` makes sure, on the
first batch, that the model keeps the sequences of a row apart. Attention runs within each sequence and never builds a
mask of the whole row; whatever else mixes tokens (recurrent layers, convolutions) can't be kept apart and is refused.
Nothing here knows of losses or teachers.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hfkd.batch import IGNORE, FlatView, View
from hfkd.errors import PaddingFreeError
from hfkd.rows import base_model_of, decode, input_device

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

PADDING_FREE = "hfkd_padding_free"
"""The name under which transformers finds our attention."""

_SOFTMAX_LAYERS = {"full_attention", "sliding_attention"}
# What transformers hands every attention function and this one needs not: none of it changes the result here.
_INDIFFERENT = {
    *("position_ids", "position_embeddings", "use_cache", "past_key_values", "cache_position"),
    *("output_attentions", "output_hidden_states", "return_dict", "deterministic", "max_length_k", "cu_seq_lens_k"),
}
_WAYS_OUT = "Set `padding_free=False`, or take a model of plain attention layers (Llama, Qwen, Mistral, Gemma 3)."


def drop_padding(model: nn.Module) -> None:
    """Let a causal LM read flat views: it keeps flash attention where it has it, else it is given our attention.

    On padded batches (generation, evaluation) ours does what transformers' `sdpa` does.

    Args:
        model: A causal LM or a PEFT model around one.

    Raises:
        PaddingFreeError: Its layers can't keep the sequences of one row apart.
    """
    base = base_model_of(model)
    config = base.config.get_text_config()
    name = type(base).__name__
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - _SOFTMAX_LAYERS)
    if kinds or getattr(base, "_is_stateful", False):
        raise PaddingFreeError(
            f"padding_free is on, but {name} has layers of another kind than attention over all earlier tokens or a "
            f"window of them ({', '.join(kinds) or 'recurrent ones'}); they would carry one text over into the next. "
            f"{_WAYS_OUT}"
        )
    if "position_ids" not in inspect.signature(base.base_model.forward).parameters:
        raise PaddingFreeError(
            f"padding_free is on, but {name} takes no positions, so it would count on from one text to the next. "
            f"{_WAYS_OUT}"
        )
    if _has_flash(base):
        return
    if base._supports_sdpa:
        base.set_attn_implementation(PADDING_FREE)
    if base.config._attn_implementation != PADDING_FREE:
        raise PaddingFreeError(
            f"padding_free is on, but the attention of {name} can't be replaced: it isn't the scaled dot product of "
            f"transformers' attention interface (a soft cap or sinks, say). Load the model with "
            f"attn_implementation='flash_attention_2' where that is installed. {_WAYS_OUT}"
        )


def reads_flat(model: nn.Module) -> bool:
    """Whether the attention of a model can be told where the sequences of a row begin."""
    base = base_model_of(model)
    return base.config._attn_implementation == PADDING_FREE or _has_flash(base)


def run_view(model: nn.Module, view: View, padding_free: bool = False) -> tuple[Tensor, Tensor]:
    """Run the part of a causal LM that comes before its output head.

    Args:
        model: A causal LM or a PEFT model around one; after `drop_padding` where `padding_free` is on.
        view: [B, T] what it reads.
        padding_free: Whether to run it flat.

    Returns:
        The last hidden states and the labels beside them, [B, T, H] and [B, T]; flat [1, S, H] and [1, S] for the S
        real tokens. The supervised rows are the same, in the same order.
    """
    if not padding_free:
        return decode(model, view.input_ids, view.attention_mask, view.position_ids).last_hidden_state, view.labels
    flat = view.flat()
    # transformers hands a mask of four dimensions on as it is, where it would else build one of S x S.
    mask = None if _has_flash(base_model_of(model)) else flat.input_ids.new_empty((1, 1, 0, 0), dtype=torch.bool)
    output = decode(model, flat.input_ids, mask, flat.position_ids, segments=_segments(flat))
    return output.last_hidden_state, flat.labels


def check_segments(model: nn.Module, view: View, rows: int = 4, tokens: int = 128) -> None:
    """Hold the hidden states of some texts run flat against those of the same texts padded.

    Args:
        model: In eval mode.
        view: What it reads.
        rows: How many rows to run, at most.
        tokens: How many tokens of each.

    Raises:
        PaddingFreeError: They differ by more than the rounding.
    """
    sample = _beginnings(view, rows, tokens, input_device(model))
    padded, _ = run_view(model, sample)
    try:
        flat, _ = run_view(model, sample, padding_free=True)
    except (RuntimeError, TypeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise PaddingFreeError(
            f"padding_free is on, but {type(base_model_of(model)).__name__} can't read texts in one row: {error}. "
            f"{_WAYS_OUT}"
        ) from error
    lengths = sample.attention_mask.sum(dim=-1).tolist()
    wide = (states.float().split(lengths) for states in (padded[sample.attention_mask.bool()], flat[0]))
    worst = max(float((one - other).norm() / one.norm().clamp(min=1e-12)) for one, other in zip(*wide, strict=True))
    exact = padded.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(padded.device.type)
    allowed = 2e-3 if exact else 5e-2  # float32 may be multiplied as TF32
    if worst > allowed:  # no number compares as false: the loss will be none either, and its error says more
        raise PaddingFreeError(
            f"padding_free is on, but {type(base_model_of(model)).__name__} doesn't keep texts in one row apart: "
            f"the hidden states of a text differ from those of the padded batch by {worst:.2g} of their size (allowed "
            f"{allowed:g}). Learning from them would be learning from mixed texts. {_WAYS_OUT}"
        )


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **known: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a flat row; transformers' `sdpa` where no sequences are told.

    Args:
        module: The attention layer.
        query: [1, heads, S, D].
        key: [1, key heads, S, D].
        value: [1, key heads, S, D'].
        attention_mask: Read in padded batches only.
        dropout: Of the attention weights.
        scaling: Factor on the products; None for 1 / sqrt(D).
        known: `cu_seq_lens_q` [B + 1] where the sequences begin, `max_length_q`, `sliding_window` in tokens, and what
            makes no difference.

    Returns:
        [1, S, heads, D'], and no weights.

    Raises:
        PaddingFreeError: The layer asks for something else than this, or doesn't hand on where the sequences begin.
    """
    starts = known.pop("cu_seq_lens_q", None)
    if starts is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise PaddingFreeError(
                f"padding_free is on, but the model doesn't tell its {type(module).__name__} where the texts in a row "
                f"begin. {_WAYS_OUT}"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **known)
    longest, window = known.pop("max_length_q"), known.pop("sliding_window", None)
    causal = known.pop("is_causal", None)
    _refuse_unknown(module, getattr(module, "is_causal", True) if causal is None else causal, known)
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings may have widened some of them
        narrow = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    if _has_kernel(query, value, dropout):
        return _in_one_kernel(query, key, value, starts, longest, window, scaling), None
    lengths = starts.diff().tolist()
    return _one_by_one(query, key, value, lengths, window, dropout=dropout, scaling=scaling), None


def _refuse_unknown(module: nn.Module, causal: bool, known: dict[str, Any]) -> None:
    unknown = sorted(name for name, value in known.items() if name not in _INDIFFERENT and value is not None)
    if unknown or not causal:
        raise PaddingFreeError(
            f"padding_free is on, but {type(module).__name__} asks for "
            f"{', '.join(unknown) or 'attention to later tokens'}, which can't be had in a row of several texts. "
            f"{_WAYS_OUT}"
        )


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    window: int | None,
    *,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """[1, S, heads, D'] one sequence after the other."""
    # One split, and not a slice a sequence, whose gradients would each be as long as the row.
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    attended = []
    for one, its_key, its_value in parts:
        band = _band(one.shape[2], window, one.device) if window and one.shape[2] > window else None
        attended.append(
            nn.functional.scaled_dot_product_attention(
                *(one, its_key, its_value, band),
                dropout_p=dropout,
                is_causal=band is None,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous()


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[length, length] each token sees itself and the `window - 1` before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _has_kernel(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's flash attention over sequences of several lengths takes these."""
    return (
        varlen_attn is not None
        and query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and not dropout
        and {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()  # older ones lack them
    )


def _in_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, window: int | None, scaling: float | None
) -> Tensor:
    """[1, S, heads, D] all sequences at once."""
    states = (one[0].transpose(0, 1) for one in (query, key, value))
    # The kernel counts the tokens before the one that looks; transformers counts that one, too.
    seen = (window - 1 if window else -1, 0)
    grouped = query.shape[1] != key.shape[1]
    ends = (starts, starts, longest, longest)
    return varlen_attn(*states, *ends, scale=scaling, window_size=seen, enable_gqa=grouped)[None]


def _segments(flat: FlatView) -> dict[str, Any]:
    """Where the sequences begin, in the words of transformers' attention functions."""
    starts = nn.functional.pad(flat.lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(flat.lengths.max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def _beginnings(view: View, rows: int, tokens: int, device: torch.device) -> View:
    """The first tokens of some rows, padded on the right, nothing learned. A row alone stands there twice: it has to
    have a neighbour.
    """
    pairs = zip(view.input_ids, view.attention_mask.bool(), strict=True)
    texts = [text for ids, real in pairs if len(text := ids[real][:tokens])][:rows] or [view.input_ids[0, :1]]
    texts = texts if len(texts) > 1 else texts * 2
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True).to(device)
    return View(ids, mask, torch.full_like(ids, IGNORE))


def _has_flash(base: nn.Module) -> bool:
    return "flash" in str(base.config._attn_implementation)


AttentionInterface.register(PADDING_FREE, segment_attention)
AttentionMaskInterface.register(PADDING_FREE, sdpa_mask)
