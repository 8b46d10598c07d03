"""What a codec keeps: round trips within the stated errors, and draws that are right on average."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hfkd.cache import CacheError, Hidden, Sampled, TopK, make_codec
from hfkd.cache.code import Reading
from hfkd.cache.packing import bits_for, pack_ids, quantise, restore, restored_error, unpack_ids
from hfkd.losses import ForwardKL
from hfkd.rows import LOWEST, Head, TopKRows
from hfkd.support import TokenChunk

CPU = torch.device("cpu")
V = 384
KEYS, TOKENS = ["0a" * 16, "1b" * 16, "2c" * 16], [3, 1, 4]


def distributions(rows: int = 8, vocab_size: int = V, sharpness: float = 3.0, seed: int = 0) -> torch.Tensor:
    """[rows, V] log-probabilities as peaked as a model's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(sharpness * torch.randn(rows, vocab_size, generator=generator), dim=-1)


def round_trip(codec, found: torch.Tensor, keys: list[str] = KEYS, tokens: list[int] = TOKENS, **reading):
    """Write texts and read them back."""
    drawn = [codec.draws(key, count) for key, count in zip(keys, tokens, strict=True)]
    told = codec.tell(found.clone(), None if drawn[0] is None else torch.from_numpy(np.concatenate(drawn)))
    ends = np.cumsum(tokens)
    packed = [
        codec.pack({name: values[end - count : end] for name, values in told.items()}, found.shape[-1])
        for count, end in zip(tokens, ends, strict=True)
    ]
    columns = {name: [one[name] for one in packed] for name in codec.columns()}
    return codec.read(columns, tokens, Reading(found.shape[-1], **reading), CPU), packed


@pytest.mark.parametrize("vocab_size", [2, 300, 384, 49152, 65537, 151936, 262144])
def test_ids_survive_their_packing(vocab_size: int) -> None:
    """An id whose bits are cut or shifted is another token, in silence."""
    generator, bits = np.random.default_rng(0), bits_for(vocab_size)
    pieces = [generator.integers(0, vocab_size, count) for count in (7, 0, 1, 64, 13)]
    pieces[3][:2] = vocab_size - 1, 0
    packed = [pack_ids(piece, bits) for piece in pieces]
    assert [len(piece) for piece in packed] == [-(-len(piece) * bits // 8) for piece in pieces]
    found = unpack_ids(packed, [len(piece) for piece in pieces], bits, CPU)
    assert found.tolist() == np.concatenate(pieces).tolist()


@pytest.mark.parametrize("sharpness", [0.0, 0.5, 3.0, 12.0, 60.0])
def test_eight_bits_keep_the_stated_error(sharpness: float) -> None:
    """A bound that doesn't hold is a promise that a cache breaks where distributions are sharp or flat."""
    exact = distributions(64, 200, sharpness).topk(40, dim=-1).values
    codes, bounds = quantise(exact)
    error = (restore(codes, bounds) - exact).abs()
    assert bool((error <= restored_error(exact, bounds)).all())
    if sharpness == 3.0:
        assert float(error.max()) < 0.05, "the bound is no excuse: eight bits are finer than that"
        assert float(error[:, 0].max()) < 1e-3, "the largest entry, which decides most, is kept as float16"


def test_the_bound_of_eight_bits_is_tight() -> None:
    """A bound far above the error would let a broken quantiser pass."""
    exact = distributions(256, 200, 3.0).topk(40, dim=-1).values
    codes, bounds = quantise(exact)
    error = (restore(codes, bounds) - exact).abs()
    assert float((error / restored_error(exact, bounds)).max()) > 0.7


@pytest.mark.parametrize("never", [-1e4, float("-inf")])
def test_an_id_that_is_ruled_out_costs_the_others_nothing(never: float) -> None:
    """One masked id stretched the range to ten thousand nats, and eight bits kept nothing of all others."""
    exact = distributions(16, 200, 3.0).topk(40, dim=-1).values
    alone = (restore(*quantise(exact[:, :39])) - exact[:, :39]).abs()
    ruled = exact.clone()
    ruled[:8, 39] = never
    codes, bounds = quantise(ruled)
    found = restore(codes, bounds)
    assert bool((found[:8, 39] == LOWEST).all()) and bool((codes[:8, :39] < 255).all())
    assert bool((bounds[:8, 1] < 0).all()) and bool((bounds[8:, 1] > 0).all())
    error = (found - exact).abs()
    error[:8, 39] = 0
    assert bool((error <= restored_error(exact, bounds)).all())
    assert float(error[:8].max()) < 1.05 * float(alone.max()) + 1e-3


@pytest.mark.parametrize("compact", [False, True])
def test_a_teacher_with_masked_ids_comes_back(compact: bool) -> None:
    """The same through the codec of all ids: what is ruled out stays so, and the mass of the others sums to 1."""
    logits = 3 * torch.randn(8, V, generator=torch.Generator().manual_seed(0))
    logits[:, 5] = float("-inf")
    found = torch.log_softmax(logits, dim=-1)
    rows, _ = round_trip(TopK(V, compact), found)
    kept = rows.log_probs.gather(-1, rows.ids.argsort(dim=-1))
    assert bool((kept[:, 5] < -9e3).all())
    others = torch.arange(V) != 5
    assert float((kept - found)[:, others].abs().max()) < 0.1
    torch.testing.assert_close(kept.logsumexp(dim=-1), torch.zeros(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("codec", [TopK(16), TopK(16, True), Sampled(20), Sampled(20, 0.8, True)])
def test_a_text_without_a_token_is_no_row(codec) -> None:
    """A text of which nothing is learned broke the reading of its whole batch."""
    found = distributions(4)
    rows, _ = round_trip(codec, found, KEYS, [3, 0, 1])
    alone, _ = round_trip(codec, found, KEYS[::2], [3, 1])
    assert len(rows) == 4
    assert torch.equal(rows.ids, alone.ids) and torch.equal(rows.log_probs, alone.log_probs)
    none, _ = round_trip(codec, found[:0], KEYS[:1], [0])
    assert len(none) == 0


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("k", [1, 13, 64, V])
def test_topk_comes_back_within_its_error(k: int, compact: bool) -> None:
    """Rows out of order, entries of a neighbour or a lost tail would teach another token's distribution."""
    found = distributions()
    rows, _ = round_trip(TopK(k, compact), found, temperature=2.0)
    values, ids = found.topk(k, dim=-1)
    assert torch.equal(rows.ids, ids) and rows.ids.dtype == torch.long
    assert (rows.vocab_size, rows.temperature) == (V, 2.0)
    reach = values[:, :1] - values[:, -1:]
    bound = (
        (((values[:, :1] - values) * reach).sqrt() / 255 + reach / 510**2 + 1e-3)
        if compact
        else 2**-11 * values.abs() + 1e-6
    )
    largest = bound.amax(dim=-1, keepdim=True) + 2**-11 * 20  # the rescaling; a tail is at least -20 here
    assert bool(((rows.log_probs - values).abs() <= bound + largest).all())
    if k == V:
        assert rows.tail is None
    else:
        exact = found.scatter(-1, ids, float("-inf")).logsumexp(dim=-1)
        torch.testing.assert_close(rows.tail, exact, rtol=2e-3, atol=0.05)
        total = torch.logaddexp(rows.log_probs.logsumexp(dim=-1), rows.tail)
        torch.testing.assert_close(total, torch.zeros(len(found)), rtol=0, atol=1e-6)


def test_compact_is_smaller() -> None:
    """A compact form that takes as much room has no reason to be less exact."""
    found = distributions(8, 49152)
    sizes = {}
    for compact in (False, True):
        codec = TopK(64, compact)
        _, packed = round_trip(codec, found)
        sizes[compact] = sum(array.nbytes for one in packed for array in one.values()) / 8
        assert sizes[compact] <= codec.bytes_per_token(49152, 0, 4), "the disk is measured by this before a build"
    assert sizes == {False: 6 * 64 + 2, True: 3 * 64 + 6}


def test_topk_is_read_by_a_loss_with_the_stated_error() -> None:
    """The figure that matters is the loss: what eight bits cost in KL must stay far below what a step learns."""
    found, student = distributions(8), distributions(8, seed=1)
    targets = torch.zeros(8, dtype=torch.long)
    values, ids = found.topk(64, dim=-1)
    tail = found.scatter(-1, ids, float("-inf")).logsumexp(dim=-1)
    exact = ForwardKL()(TokenChunk(targets, student, TopKRows(ids, values, V, 1.0, tail)))
    for compact, allowed in ((False, 2e-3), (True, 2e-2)):
        rows, _ = round_trip(TopK(64, compact), found)
        got = ForwardKL()(TokenChunk(targets, student, rows))
        assert float((got - exact).abs().max()) < allowed
        assert float((got - exact).abs().max()) > 0


@pytest.mark.parametrize("dtype", ["model", "float32", "bfloat16", "float16"])
def test_hidden_states_come_back(dtype: str) -> None:
    """A state in the wrong row or type is another distribution."""
    states = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    head = Head(torch.randn(V, 32))
    codec = Hidden(dtype)
    named = "float32" if dtype == "model" else dtype
    told = codec.tell(states, None)
    packed = [codec.pack({"hidden": told["hidden"][a:b]}, V) for a, b in ((0, 3), (3, 4), (4, 8))]
    rows = codec.read({"hidden": [one["hidden"] for one in packed]}, TOKENS, Reading(V, 1.0, head, named), CPU)
    assert rows.hidden.dtype == head.weight.dtype
    assert torch.equal(rows.hidden, states.to(getattr(torch, named)).float())


def test_a_state_too_large_for_its_type_is_refused() -> None:
    """Infinity in float16 would be a loss that is no number, a night later."""
    with pytest.raises(CacheError, match="float16.*bfloat16"):
        Hidden("float16").tell(torch.full((1, 4), 1e6), None)


def kl_gradient(student: torch.Tensor, teacher) -> torch.Tensor:
    leaf = student.clone().requires_grad_()
    targets = torch.zeros(len(student), dtype=torch.long)
    ForwardKL()(TokenChunk(targets, leaf, teacher)).sum().backward()
    return leaf.grad


def standard_error(student: torch.Tensor, found: torch.Tensor, power: float, draws: int) -> torch.Tensor:
    """[N, V] of the mean gradient, from the definition: one draw of i from q gives `p_i / q_i (s_v - [i = v])`."""
    likely, own = found.double().exp(), student.double().softmax(dim=-1)
    proposal = (found.double() * power).softmax(dim=-1)
    each = (likely / proposal)[:, :, None] * (own[:, None, :] - torch.eye(found.shape[-1], dtype=torch.double))
    variance = (proposal[:, :, None] * each**2).sum(dim=1) - (own - likely) ** 2
    return (variance / draws).sqrt()


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("power", [1.0, 0.8])
def test_the_mean_over_draws_is_the_dense_gradient(power: float, compact: bool) -> None:
    """Biased draws teach another distribution, however many there are."""
    found, student = distributions(4, 60, 1.5), distributions(4, 60, 1.5, seed=1)
    dense = kl_gradient(student, found)
    assert float(dense.abs().max()) > 0.01
    got = []
    for seed in range(200):
        rows, _ = round_trip(Sampled(20, power, compact, seed), found, KEYS[:2], [3, 1])
        got.append(kl_gradient(student, rows))
    away = torch.stack(got).double().mean(dim=0) - dense
    error = standard_error(student, found, power, draws=20 * 200)
    assert float(away.norm() / error.norm()) < 3, "the whole gradient, against its own standard error"
    often = (found.double() * power).softmax(dim=-1) * 20 * 200 > 10  # the rest is drawn too rarely for a bell curve
    far = (away.abs() / error)[often]
    assert len(far) > 80 and float(far.max()) < 4.5 and float((far > 3).double().mean()) <= 0.02


def test_wrong_weights_would_be_seen() -> None:
    """The test above must fail where the proposal is forgotten: draws from p ** 0.8 with the weights of p."""
    found, student = distributions(4, 60, 1.5), distributions(4, 60, 1.5, seed=1)
    dense, got = kl_gradient(student, found), []
    for seed in range(200):
        rows, packed = round_trip(Sampled(20, 0.8, False, seed), found, KEYS[:2], [3, 1])
        counts = rows.weights.clone()
        for row in range(4):
            real = rows.weights[row] > 0
            drawn = np.concatenate([one["counts"] for one in packed])
            start = int((rows.weights[:row] > 0).sum())
            counts[row, real] = torch.from_numpy(drawn[start : start + int(real.sum())].astype(np.float32)) / 20
        got.append(kl_gradient(student, type(rows)(rows.ids, rows.log_probs, counts, rows.vocab_size)))
    away = torch.stack(got).double().mean(dim=0) - dense
    assert float(away.norm() / standard_error(student, found, 0.8, draws=20 * 200).norm()) > 3


@pytest.mark.parametrize("power", [1.0, 0.8])
@pytest.mark.parametrize("compact", [False, True])
def test_draws_are_the_texts_own(power: float, compact: bool) -> None:
    """Draws that depend on the neighbours in a batch would make a resumed build another cache."""
    found, codec = distributions(), Sampled(300, power, compact)
    together, _ = round_trip(codec, found)
    alone, _ = round_trip(codec, found[3:4], KEYS[1:2], [1])
    real = alone.weights[0] > 0
    assert torch.equal(together.ids[3][together.weights[3] > 0], alone.ids[0][real])
    assert torch.equal(together.weights[3][together.weights[3] > 0], alone.weights[0][real])
    exact = found.gather(-1, together.ids)
    shown = together.weights > 0
    assert float((together.log_probs - exact)[shown].abs().max()) < (0.08 if compact else 0.01)
    assert not bool(together.ids[~shown].any()) and not bool(together.log_probs[~shown].any())
    for ids, mark in zip(together.ids, shown, strict=True):
        assert len(ids[mark].unique()) == int(mark.sum()), "an id that was drawn twice is one entry"


def test_power_one_weighs_to_one() -> None:
    """With draws from p itself the weights are shares of the draws; their sum is 1 to the last bit of a float."""
    rows, packed = round_trip(Sampled(300), distributions())
    torch.testing.assert_close(rows.weights.sum(dim=-1), torch.ones(8))
    assert packed[0]["counts"].dtype == np.uint16
    other, _ = round_trip(Sampled(300, seed=1), distributions())
    assert other.ids.shape != rows.ids.shape or not torch.equal(other.ids, rows.ids)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("topk", {"k": 0}, "codec.k is 0"),
        ("sampled", {"power": 0.0}, "codec.power 0.0"),
        ("sampled", {"k": 3}, "settings.*rounds.*got.*k"),
        ("hidden", {"dtype": "int8"}, "codec.dtype is 'int8'"),
        ("quantum", {}, "codec.kind is 'quantum'.*topk, sampled, hidden"),
    ],
)
def test_impossible_settings_are_refused(kind: str, settings: dict, words: str) -> None:
    """A setting that is dropped in silence gives another cache than the one that was asked for."""
    with pytest.raises(CacheError, match=words):
        make_codec(kind, **settings)


@pytest.mark.parametrize("codec", [TopK(5, True), Sampled(7, 0.5, True, 3), Hidden("bfloat16")])
def test_a_codec_is_made_again_from_its_description(codec) -> None:
    """The manifest must tell how to read what lies beside it."""
    assert make_codec(**codec.describe()) == codec


def test_more_ids_than_there_are() -> None:
    """A k above the vocabulary says so instead of failing in torch."""
    with pytest.raises(CacheError, match="k is 500.*384"):
        TopK(500).tell(distributions(), None)
