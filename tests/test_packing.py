"""Padding-free runs: one row a batch, the same loss and the same gradients, and no text that reads its neighbour."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import tiny
from conftest import make_model
from torch import Tensor, nn
from training import worst_difference
from transformers import AttentionInterface, AutoModelForCausalLM

import hfkd.packing as packing
from hfkd.batch import IGNORE, View
from hfkd.errors import PaddingFreeError
from hfkd.packing import PADDING_FREE, check_segments, drop_padding, run_view, segment_attention
from hfkd.rows import supervised
from hfkd.student import check_head

LENGTHS = (40, 11, 25, 2, 19)


def view_of(side: str = "right", lengths: tuple[int, ...] = LENGTHS, vocabulary: int = 96) -> View:
    """Rows of these lengths; the second half of each is learned."""
    ids = torch.randint(3, vocabulary, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(7))
    places = torch.arange(max(lengths)).expand_as(ids)
    if side == "left":
        places = places.flip(1)
    length = torch.tensor(lengths)[:, None]
    mask = places < length
    learned = mask & ((places >= length // 2) if side == "right" else (places < length - length // 2))
    return View(ids.where(mask, 0), mask.long(), ids.where(learned & (length > 1), IGNORE))


def learned(model: nn.Module, view: View, padding_free: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The supervised rows, and the gradients of a cost on them."""
    model.zero_grad()
    hidden, labels = run_view(model, view, padding_free)
    rows = supervised(hidden, labels)
    rows.mul(torch.linspace(-1, 1, rows.numel()).view_as(rows)).sum().backward()
    return rows.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, view: View, accuracy: float = 1e-5) -> None:
    """Rows and gradients are those of the padded view."""
    rows, gradients = learned(model, view, False)
    flat_rows, flat_gradients = learned(model, view, True)
    assert float((rows - flat_rows).norm() / rows.norm()) < accuracy
    assert len(gradients) > 3 and gradients.keys() == flat_gradients.keys()
    whole = torch.stack([value.norm() for value in gradients.values()]).norm()
    for name, value in gradients.items():  # what is zero but for the rounding is held against the whole
        assert float((value - flat_gradients[name]).norm()) < accuracy * max(float(value.norm()), 1e-2 * float(whole))


def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of segments of each flat run from now on."""
    found: list[int] = []
    attend = packing._segments
    monkeypatch.setattr(packing, "_segments", lambda flat: found.append(len(flat.lengths)) or attend(flat))
    return found


def mix_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that takes the whole row for one text."""
    attend = packing._one_by_one
    monkeypatch.setattr(
        packing, "_one_by_one", lambda q, k, v, lengths, *rest, **more: attend(q, k, v, [sum(lengths)], *rest, **more)
    )


# ------------------------------------------------------------------------------------------- the view


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_flat_view_is_its_real_tokens(side):
    """Prevents a row that is moved, cut or learned from another one's last token."""
    view = view_of(side, (3, 0, 1, 4))
    flat = view.flat()
    assert flat.lengths.tolist() == [3, 1, 4]
    assert flat.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert flat.input_ids[0].tolist() == view.input_ids[view.attention_mask.bool()].tolist()
    assert flat.labels[0, [0, 3, 4]].tolist() == [IGNORE] * 3
    assert flat.labels[:, 1:][flat.labels[:, 1:] != IGNORE].tolist() == view.targets.tolist() != []


def test_the_first_token_of_a_text_is_not_learned_from_the_text_before():
    """Prevents a label on the first token (whole texts are learned) from becoming a row that no padded view has."""
    ids = torch.arange(3, 11).view(2, 4)
    view = View(ids, torch.ones_like(ids), ids)
    flat = view.flat()
    assert supervised(flat.input_ids, flat.labels).tolist() == [3, 4, 5, 7, 8, 9]


def test_labels_behind_padding_are_refused():
    """Prevents rows that mean something else than the padded view's: learned from padding there, from a text here."""
    ids, mask = torch.ones(1, 3, dtype=torch.long), torch.tensor([[0, 1, 1]])
    for labels in ([IGNORE, 1, 1], [1, 1, IGNORE]):
        with pytest.raises(ValueError, match="padding"):
            View(ids, mask, torch.tensor([labels])).flat()
    with pytest.raises(ValueError, match="padding"):
        View(ids, mask.flip(1), torch.tensor([[IGNORE, 1, 1]])).flat()


def test_a_batch_of_nothing_still_runs(model):
    """Prevents a crash on a batch whose rows are all masked, which other processes wait for."""
    drop_padding(model)
    nothing = torch.zeros(2, 3, dtype=torch.long)
    view = View(nothing, nothing, torch.full_like(nothing, IGNORE))
    hidden, labels = run_view(model, view, True)
    assert supervised(hidden, labels).shape == (0, 32) and bool(torch.isfinite(hidden).all())


# ------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "kind",
    ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gpt2", "phi", "granite", "cohere", "minicpm3"],
)
def test_rows_and_gradients_are_those_of_the_padded_view(kind, side):
    """Prevents an architecture's positions, windows, scales or grouped heads from being lost on the way."""
    model = tiny(kind)
    drop_padding(model)
    assert_same(model, view_of(side))
    with torch.no_grad():
        check_segments(model, view_of(side))


def test_a_window_shorter_than_the_text_is_kept(monkeypatch):
    """Guards the test above: its Mistral would not be told from one without a window if the window were too wide."""
    model = tiny("mistral", sliding_window=8)
    drop_padding(model)
    model.requires_grad_(False)
    narrow, _ = run_view(model, view_of(), True)
    monkeypatch.setattr(packing, "_band", lambda length, window, device: torch.ones(length, length).tril().bool())
    wide, _ = run_view(model, view_of(), True)
    assert float((narrow - wide).norm() / narrow.norm()) > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_runs_the_same_segments(reentrant):
    """Prevents a second forward in the backward pass that no longer knows where the texts begin."""
    model = make_model(vocab_size=96)
    drop_padding(model)
    plain = learned(model.train(), view_of(), True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = learned(model, view_of(), True)
    assert torch.equal(plain[0], again[0]) and worst_difference(plain[1], again[1]) < 1e-6


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gemma2", "soft cap"),
        ("gptj", "can't be replaced"),
        ("mamba", "linear_attention"),
        ("falcon_h1", "hybrid"),
        ("recurrent_gemma", "linear_attention"),
    ],
)
def test_models_that_cannot_are_refused(kind, words):
    """Prevents a recurrent or capped layer that carries one text into the next without a word."""
    with pytest.raises(PaddingFreeError, match=words):
        drop_padding(tiny(kind))


def test_a_model_that_mixes_texts_is_refused_on_the_first_batch(model, monkeypatch):
    """Prevents learning from mixed texts where an architecture ignores the segments, whatever else of it fits."""
    drop_padding(model)
    for lengths in (LENGTHS, (9,), (5, 0)):
        check_head(model, view_of(lengths=lengths), padding_free=True)
    mix_texts(monkeypatch)
    for lengths in (LENGTHS, (9,), (5, 0)):
        with pytest.raises(PaddingFreeError, match="doesn't keep texts in one row apart"):
            check_head(model, view_of(lengths=lengths), padding_free=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_mistaken_for_mixing(dtype, monkeypatch):
    """Prevents half precision from being refused, and from hiding a model that mixes texts."""
    model = make_model(num_hidden_layers=6).to(dtype)
    drop_padding(model)
    with torch.no_grad():
        check_segments(model, view_of())
        mix_texts(monkeypatch)
        with pytest.raises(PaddingFreeError):
            check_segments(model, view_of())


def test_positions_that_count_on_are_refused(monkeypatch):
    """Prevents learned positions beyond those that the padded view has."""
    model = tiny("gpt2")
    drop_padding(model)
    flat = View.flat
    monkeypatch.setattr(View, "flat", lambda view: _counted_on(flat(view)))
    with pytest.raises(PaddingFreeError, match="apart"):
        check_segments(model, view_of())


def _counted_on(flat: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(flat), "position_ids": torch.arange(flat.input_ids.shape[1])[None]})


def test_a_layer_that_asks_for_more_is_refused():
    """Prevents a soft cap, a sink or attention to later tokens from being dropped in silence."""
    states = torch.randn(1, 2, 5, 4)
    told = {"cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32), "max_length_q": 3}
    segment_attention(nn.Module(), *[states] * 3, None, **told, softcap=None, position_ids=states)
    for more in ({"softcap": 2.0}, {"s_aux": states}, {"is_causal": False}, {"something_new": 1}):
        with pytest.raises(PaddingFreeError, match="asks for"):
            segment_attention(nn.Module(), *[states] * 3, None, **told, **more)
    with pytest.raises(PaddingFreeError, match="doesn't tell"):
        segment_attention(nn.Module(), *[states] * 3, torch.ones(1, 1, 0, 0))


def test_no_mask_of_the_whole_row_is_built(model, monkeypatch):
    """Prevents memory that grows with the square of the batch."""
    drop_padding(model)
    asked = []
    attend = nn.functional.scaled_dot_product_attention

    def noting(query: Tensor, *states: Any, **more: Any) -> Tensor:
        asked.append((query.shape[2], states[2]))
        return attend(query, *states, **more)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noting)
    run_view(model, view_of(), True)
    assert asked == [(length, None) for length in LENGTHS] * 2


def test_the_kernel_is_asked_for_the_same(monkeypatch):
    """Prevents a window off by one, other ends or other shapes where the kernel of a GPU does the work."""

    def kernel(query, key, value, starts, key_starts, longest, key_longest, *, scale, window_size, enable_gqa):
        """What torch says of `varlen_attn`: [T, heads, D], `window_size` tokens to the left and to the right."""
        assert window_size[1] == 0 and longest == key_longest == 13 and torch.equal(starts, key_starts)
        parts = []
        for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
            states = [one[start:end].transpose(0, 1) for one in (query, key, value)]
            steps = torch.arange(end - start)
            before = steps[:, None] - steps
            seen = (before >= 0) & ((before <= window_size[0]) | (window_size[0] < 0))
            out = nn.functional.scaled_dot_product_attention(
                *states, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
            )
            parts.append(out.transpose(0, 1))
        return torch.cat(parts)

    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 21, 8) for heads in (4, 2, 2))
    told = {"cu_seq_lens_q": torch.tensor([0, 3, 16, 21], dtype=torch.int32), "max_length_q": 13, "scaling": 0.4}
    for window in (None, 1, 4, 50):
        expected, _ = segment_attention(nn.Module(), query, key, value, None, sliding_window=window, **told)
        with monkeypatch.context() as patch:
            patch.setattr(packing, "_has_kernel", lambda *states: True)
            patch.setattr(packing, "varlen_attn", kernel)
            found, _ = segment_attention(nn.Module(), query, key, value, None, sliding_window=window, **told)
        torch.testing.assert_close(found, expected)


def test_flash_attention_is_told_in_its_own_words(model, monkeypatch):
    """Prevents a mask that makes transformers' flash attention pad again, or segments under names that it ignores."""
    told = {}

    def flash(module, query, key, value, attention_mask, *, cu_seq_lens_k, max_length_k, **more):
        told.update(mask=attention_mask, starts=cu_seq_lens_k, longest=max_length_k)
        return segment_attention(module, query, key, value, None, max_length_k=max_length_k, **more)

    expected, _ = run_view(model, view_of())
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    model.config._attn_implementation_internal = "flash_attention_2"
    drop_padding(model)
    assert model.config._attn_implementation == "flash_attention_2"
    found, _ = run_view(model, view_of(), True)
    torch.testing.assert_close(found[0], expected[view_of().attention_mask.bool()])
    assert told["mask"] is None and told["longest"] == 40 and told["starts"].dtype == torch.int32
    assert told["starts"].tolist() == [0, 40, 51, 76, 78, 97]


def test_padded_batches_are_what_they_were(model, tmp_path):
    """Prevents generation and evaluation that change with the setting, and a saved model that needs this package."""
    view, prompts = view_of("left"), view_of("left", (7, 3, 5))
    told = {"input_ids": view.input_ids, "attention_mask": view.attention_mask}
    asked = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask, "max_new_tokens": 8}
    logits, written = model(**told).logits, model.generate(**asked, do_sample=False)
    drop_padding(model)
    assert model.config._attn_implementation == PADDING_FREE
    assert torch.equal(model(**told).logits, logits) and torch.equal(model.generate(**asked, do_sample=False), written)
    model.save_pretrained(tmp_path)
    assert PADDING_FREE not in "".join(file.read_text() for file in tmp_path.glob("*.json"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
