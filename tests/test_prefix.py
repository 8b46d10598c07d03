"""A prefix that is run once must give what running every prompt whole gives, or stand aside."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny
from torch import Tensor, nn

from hfkd.batch import IGNORE, View
from hfkd.errors import UnsupportedCache
from hfkd.prefix import SharedPrefix, common_prefix
from hfkd.rows import decode, supervised

PREFIX = [3 + (7 * place) % 90 for place in range(24)]
RESTS = [([5, 6, 7], [40, 41]), ([8], [42, 43, 44]), ([9, 10, 11, 12, 13], [45])]


def view_of(side: str = "right", prefix: list[int] = PREFIX, rests: list = RESTS, extra: int = 0) -> View:
    """Rows that begin with the prefix, of different lengths, the answers learned.

    Args:
        side: Of the padding.
        prefix: The tokens of the demonstrations.
        rests: Question and answer of each row.
        extra: Columns of padding that no row fills.
    """
    width = max(len(prefix) + len(question) + len(answer) for question, answer in rests) + extra
    columns: tuple[list, list, list] = ([], [], [])
    for question, answer in rests:
        length = len(prefix) + len(question) + len(answer)
        row = (prefix + question + answer, [1] * length, [IGNORE] * (length - len(answer)) + answer)
        for column, values, blank in zip(columns, row, (0, 0, IGNORE), strict=True):
            fill = [blank] * (width - length)
            column.append(values + fill if side == "right" else fill + values)
    return View(*(torch.tensor(column) for column in columns))


def whole(model: nn.Module, view: View) -> Tensor:
    """The supervised rows, every prompt run whole."""
    with torch.no_grad():
        return supervised(
            decode(model, view.input_ids, view.attention_mask, view.position_ids).last_hidden_state, view.labels
        )


def reused(model: nn.Module, view: View, prefix: SharedPrefix) -> Tensor:
    """The supervised rows behind a prefix that is run once."""
    rest = prefix.rest_of(view)
    assert rest is not None
    with torch.no_grad():
        return supervised(prefix.decode_rest(model, rest), rest.labels)


# --------------------------------------------------------------------------- what prompts share


@pytest.mark.parametrize(
    ("sequences", "limit", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4, 5]], None, [1, 2]),
        ([[1, 2, 3], [1, 2, 3]], None, [1, 2, 3]),
        ([[1, 2], [1, 2, 3], [1]], None, [1]),
        ([[1, 2], [2, 1]], None, []),
        ([[1, 2], [], [1, 2]], None, []),
        ([], None, []),
        ([[]], None, []),
        ([[1, 2, 3, 4]], None, [1, 2, 3, 4]),
        ([[1, 2, 3, 4]], 2, [1, 2]),
        ([[1, 2, 3], [1, 2, 3, 4]], 2, [1, 2]),
        ([[1, 2, 3], [1, 9, 3]], 2, [1]),
        ([[1, 2, 3], [1, 2, 3]], 0, []),
        ([[1, 2, 9, 4], [1, 2, 3, 4], [1, 2, 9, 4]], None, [1, 2]),  # what comes after a difference is not shared
        ([(1, 2), [1, 2]], None, [1, 2]),
    ],
)
def test_common_prefix(sequences, limit, expected):
    """Prevents a prefix that some prompt doesn't begin with, which would teach answers to another prompt."""
    assert common_prefix(sequences, limit) == expected
    assert common_prefix(iter(sequences), limit) == expected


def test_common_prefix_leaves_its_input_alone():
    """Prevents prompts that get shorter because their shared start was looked for."""
    sequences = [[1, 2, 3], [1, 2]]
    common_prefix(sequences)
    assert sequences == [[1, 2, 3], [1, 2]]


# ------------------------------------------------------------------------- the same rows, for less

# Windows below, at, just above and far above the prefix's 24 tokens; Gemma alternates windows with full attention.
MODELS = [
    ("llama", {}),
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"sliding_window": 23}),
    ("mistral", {"sliding_window": 24}),
    ("mistral", {"sliding_window": 25}),
    ("mistral", {"sliding_window": 100}),
    ("gemma2", {"sliding_window": 5}),
    ("gemma2", {"sliding_window": 100}),
    ("gemma3_text", {"sliding_window": 5}),
    ("gpt2", {}),
    ("gptj", {}),
    ("minicpm3", {}),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("model_type", "settings"), MODELS, ids=lambda x: str(x))
def test_reuse_gives_the_rows_of_the_plain_path(model_type, settings, side):
    """Prevents a wrong mask, wrong positions or a window cut at the wrong place behind the prefix: the teacher would
    say something else than the model does.
    """
    model, view = tiny(model_type, **settings), view_of(side)
    expected = whole(model, view)
    found = reused(model, view, SharedPrefix(PREFIX))
    assert expected.shape == (6, 32) and expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("model_type", "settings"), MODELS, ids=lambda x: str(x))
def test_the_prefix_is_read_at_all(model_type, settings):
    """Prevents the test above from passing on a model that doesn't look back at its prefix."""
    model = tiny(model_type, **settings)
    other = [token + 1 for token in PREFIX]
    difference = whole(model, view_of()) - whole(model, view_of(prefix=other))
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2"])
def test_sides_agree_and_empty_columns_do_not_matter(model_type):
    """Prevents rows that depend on how far a batch happens to be padded (to a multiple of 8, say)."""
    model, prefix = tiny(model_type), SharedPrefix(PREFIX)
    first, *others = [
        reused(model, view_of(side, extra=extra), prefix) for side in ("left", "right") for extra in (0, 5)
    ]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("model_type", "settings"), [("llama", {}), ("mistral", {"sliding_window": 5})], ids=str)
def test_use_does_not_change_the_cache(model_type, settings):
    """Prevents the second batch of an epoch from reading the first one's questions: the cache is never written to."""
    model, prefix, view = tiny(model_type, **settings), SharedPrefix(PREFIX), view_of()
    kept = prefix.cache_for(model, 1)
    before = [(layer.keys.clone(), layer.values.clone(), layer.get_seq_length()) for layer in kept.layers]
    first = reused(model, view, prefix)
    assert torch.equal(reused(model, view, prefix), first)
    other = view_of(rests=[([60, 61], [62]), ([63], [64])])
    torch.testing.assert_close(reused(model, other, prefix), whole(model, other), rtol=1e-4, atol=2e-5)
    assert torch.equal(reused(model, view, prefix), first)
    for layer, (keys, values, length) in zip(prefix.cache_for(model, 1).layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        assert layer.get_seq_length() == length == len(PREFIX)


def test_a_batch_takes_no_copy_of_the_prefix():
    """Prevents the prefix's keys and values from taking a batch's memory instead of one row's."""
    prefix, model = SharedPrefix(PREFIX), tiny("llama")
    one, many = prefix.cache_for(model, 1), prefix.cache_for(model, 16)
    assert many is not one and len(many.layers) == 2
    for single, wide in zip(one.layers, many.layers, strict=True):
        for kept, expanded in ((single.keys, wide.keys), (single.values, wide.values)):
            assert expanded.shape[0] == 16 and expanded.stride(0) == 0
            assert expanded.data_ptr() == kept.data_ptr()
            assert expanded.untyped_storage().nbytes() == kept.untyped_storage().nbytes()


def count_tokens(model: nn.Module, counted: list[int]) -> None:
    """Write down how many tokens each forward of the decoder reads."""

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        counted.append(kwargs["input_ids"].numel())

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)


def test_the_prefix_is_run_once():
    """Prevents a reuse that saves nothing: one run of the prefix, then the rests alone."""
    counted: list[int] = []
    model, prefix = tiny("llama"), SharedPrefix(PREFIX)
    count_tokens(model, counted)
    for _ in range(3):
        reused(model, view_of(), prefix)
    assert counted == [24, 18, 18, 18]  # three rows of at most six tokens


def test_the_prefix_keeps_no_graph():
    """Prevents the graph of the prefix, and with it the weights of an old step, from living in the cache."""
    cache = SharedPrefix(PREFIX).cache_for(tiny("llama"), 2)
    assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in cache.layers)


def test_invalidate_forgets_the_old_weights():
    """Prevents a live self-teacher from reading keys and values of weights that it no longer has."""
    model, prefix, view = tiny("llama"), SharedPrefix(PREFIX), view_of()
    before = reused(model, view, prefix)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    expected = whole(model, view)
    assert (expected - before).abs().max() > 1e-2
    assert (reused(model, view, prefix) - expected).abs().max() > 1e-3  # a guard: the old cache shows
    prefix.invalidate()
    torch.testing.assert_close(reused(model, view, prefix), expected, rtol=1e-4, atol=2e-5)


def test_half_precision_runs_behind_the_prefix():
    """Prevents a cache of another dtype than the model's, which attention kernels refuse."""
    model, prefix, view = tiny("llama").bfloat16(), SharedPrefix(PREFIX), view_of()
    found = reused(model, view, prefix)
    assert prefix.cache_for(model, 1).layers[0].keys.dtype == found.dtype == torch.bfloat16
    torch.testing.assert_close(found, whole(model, view), rtol=0.1, atol=0.1)


# ----------------------------------------------------------------------- where it must stand aside


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_that_begins_otherwise_is_not_cut(side):
    """Prevents a row from being taught behind demonstrations that it doesn't have."""
    view = view_of(side)
    place = view.attention_mask[1].argmax() + 3
    view.input_ids[1, place] += 1
    assert SharedPrefix(PREFIX).rest_of(view) is None
    view.input_ids[1, place] -= 1
    assert SharedPrefix(PREFIX).rest_of(view) is not None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("place", "refused"), [(5, True), (23, True), (24, True), (25, False)])
def test_a_token_learned_inside_the_prefix_keeps_its_row(place, refused, side):
    """Prevents supervised rows from vanishing: the last position of the prefix predicts the first token behind it, and
    its hidden state isn't kept.
    """
    view = view_of(side)
    row = 2  # the longest, no padding
    view.labels[row, place] = view.input_ids[row, place]
    rest = SharedPrefix(PREFIX).rest_of(view)
    assert (rest is None) == refused
    if rest is not None:
        assert torch.equal(rest.targets, view.targets)


def test_a_row_no_longer_than_the_prefix_is_not_cut():
    """Prevents an empty row, whose attention has nothing to read, or a gather past the end."""
    assert SharedPrefix(PREFIX).rest_of(view_of(rests=[([], []), ([5], [6])])) is None
    assert SharedPrefix(PREFIX).rest_of(view_of(prefix=PREFIX[:10], rests=[([], [4])])) is None
    assert SharedPrefix([]).rest_of(view_of()) is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_left_holds_every_target_in_order(side):
    """Prevents rows from being paired with other tokens after the cut, and padding ids from being learned."""
    view = view_of(side, extra=2)
    rest = SharedPrefix(PREFIX).rest_of(view)
    assert torch.equal(rest.targets, view.targets) and len(rest.targets) == 6
    assert rest.input_ids.shape == (3, 6)
    assert rest.attention_mask.sum(-1).tolist() == [5, 4, 6]
    assert rest.attention_mask.dtype == view.attention_mask.dtype
    for row, (question, answer) in enumerate(RESTS):
        length = len(question) + len(answer)
        assert rest.input_ids[row, :length].tolist() == question + answer
        assert (rest.labels[row, length:] == IGNORE).all()


@pytest.mark.parametrize("model_type", ["mamba", "falcon_h1", "recurrent_gemma"])
def test_a_recurrent_state_is_refused(model_type):
    """Prevents a state that is updated in place from being shared by the rows of a batch: each would read the others'
    tokens.
    """
    with pytest.raises(UnsupportedCache, match="Every prompt is run whole instead"):
        SharedPrefix(PREFIX).cache_for(tiny(model_type), 2)


def test_checkpointing_and_an_own_setting_do_not_take_the_cache_away():
    """Prevents gradient checkpointing or `use_cache: false`, usual for students, from leaving no cache to reuse."""
    model, view = tiny("llama"), view_of()
    expected = whole(model, view)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(reused(model, view, SharedPrefix(PREFIX)), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_positions_that_depend_on_the_length_are_not_reused(rope_type):
    """Prevents Phi-3 and its kin, whose frequencies change where a prompt outgrows the original context, from reading
    a prefix that was rotated for a short one.
    """
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type == "longrope":
        rope |= {
            "short_factor": [1.0] * 4,
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 26,
        }
    model = tiny("llama", rope_parameters=rope, **({"max_position_embeddings": 26} if rope_type == "dynamic" else {}))
    view, prefix = view_of(), SharedPrefix(PREFIX)
    try:
        found = reused(model, view, prefix)
    except UnsupportedCache:
        return
    torch.testing.assert_close(found, whole(model, view), rtol=1e-4, atol=2e-5)
