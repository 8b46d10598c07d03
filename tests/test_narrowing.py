"""A student with fewer heads and narrower MLPs: `narrow`, `choose`, `narrowed`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import VOCABULARY, tiny
from conftest import make_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hfkd.narrowing import choose, narrow, narrowed
from hfkd.states import block_list
from hfkd.student import keep_layers

BOTH = ["llama", "granite", "cohere", "gemma2", "gemma3_text", "falcon_h1", "hyperclovax", "mistral"]
NEITHER = ["phi", "mamba", "gpt2", "gptj", "recurrent_gemma"]
SIZES = {"heads": 2, "intermediate": 20}

_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_COMMON |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}


def other(kind: str, **settings) -> PreTrainedModel:
    """A random model of an architecture that architectures.py hasn't."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**_COMMON, **settings})).eval()


def biased() -> PreTrainedModel:
    return tiny("llama", attention_bias=True, mlp_bias=True)


def ids(length: int = 20) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


def attention(block: nn.Module) -> nn.Module:
    return block.self_attn


def mlp(block: nn.Module) -> nn.Module:
    return next(part for part in block.modules() if hasattr(part, "up_proj"))


@pytest.fixture(params=[*BOTH, "qwen3", "qwen2", "biased"])
def large(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Models whose blocks can be narrowed in both ways: with scales, caps, windows, biases, norms of heads."""
    if request.param == "biased":
        return biased()
    if request.param == "qwen3":
        return other("qwen3", head_dim=16)  # more than the hidden size together
    return tiny(request.param) if request.param in BOTH else other(request.param)


# --- what is kept does what it did


def test_full_sizes_change_nothing(large: PreTrainedModel) -> None:
    """A copy that loses a bias or a norm, or shuffles heads, is another model before anything is narrowed."""
    config = large.config
    same = narrow(large, heads=config.num_attention_heads, intermediate=config.intermediate_size)
    assert logits(same).abs().max() > 0
    assert torch.equal(logits(same), logits(large))
    assert narrowed(same.config).heads.shares == (1.0, 1.0)


def test_kept_parts_do_what_they_did(large: PreTrainedModel) -> None:
    """Rows of the wrong head, or queries beside another head's keys, make a student of noise that trains anyway."""
    small, found = narrow(large, **SIZES), choose(large, **SIZES)
    before = logits(large)
    size = attention(block_list(large)[0]).q_proj.out_features // 4
    for number, block in enumerate(block_list(large)):
        gone = sorted({0, 1, 2, 3} - set(found.heads.numbers[number]))
        assert len(gone) == 2
        with torch.no_grad():
            for head in gone:
                attention(block).o_proj.weight[:, head * size : (head + 1) * size] = 0
            neurons = sorted(set(range(48)) - set(found.intermediate.numbers[number]))
            mlp(block).down_proj.weight[:, neurons] = 0
    assert not torch.allclose(logits(large), before, atol=1e-2)
    torch.testing.assert_close(logits(small), logits(large), rtol=1e-4, atol=1e-4)


def test_what_is_zero_goes_first(large: PreTrainedModel) -> None:
    """A criterion that keeps what says nothing throws away what says something."""
    size = attention(block_list(large)[0]).q_proj.out_features // 4
    dead = list(range(0, 48, 2))[:20]
    with torch.no_grad():
        for number, block in enumerate(block_list(large)):
            group = (number + 1) % 2
            for part in (attention(block).v_proj.weight, getattr(attention(block).v_proj, "bias", None)):
                if part is not None:
                    part[group * size : (group + 1) * size] = 0
            mlp(block).down_proj.weight[:, dead] = 0
    found = choose(large, heads=2, intermediate=28)
    assert found.heads.numbers == ((0, 1), (2, 3))
    assert found.intermediate.numbers[0] == tuple(sorted(set(range(48)) - set(dead)))
    torch.testing.assert_close(logits(narrow(large, heads=2, intermediate=28)), logits(large), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_strengths_by_their_definition() -> None:
    """A criterion that isn't the documented one can't be judged by who reads of it."""
    large = biased()
    found = choose(large, **SIZES)
    for number, block in enumerate(block_list(large)):
        part = mlp(block)
        strength = [
            max(part.gate_proj.weight[n].abs().max(), part.gate_proj.bias[n].abs())
            * max(part.up_proj.weight[n].abs().max(), part.up_proj.bias[n].abs())
            * part.down_proj.weight[:, n].abs().max()
            for n in range(48)
        ]
        best = sorted(range(48), key=lambda n: -strength[n])[:20]
        assert found.intermediate.numbers[number] == tuple(sorted(best))
        part, sums = attention(block), [0.0, 0.0]
        for head in range(4):
            values = torch.cat([part.v_proj.weight, part.v_proj.bias[:, None]], dim=1)
            inner = values[head // 2 * 8 : head // 2 * 8 + 8]
            sums[head // 2] += float((part.o_proj.weight[:, head * 8 : head * 8 + 8] @ inner).abs().max())
        assert found.heads.numbers[number] == ((0, 1) if sums[0] > sums[1] else (2, 3))


def test_a_factor_that_moves_changes_no_choice() -> None:
    """The same function written with other weights must give the same student."""
    large = tiny("llama")
    before = choose(large, **SIZES)
    with torch.no_grad():
        for block in block_list(large):
            scale = torch.linspace(0.1, 10, 48)
            block.mlp.up_proj.weight.mul_(scale[:, None])
            block.mlp.down_proj.weight.div_(scale)
    after = choose(large, **SIZES)
    assert after.intermediate.numbers == before.intermediate.numbers


# --- the new model as a model


def test_saved_and_loaded(large: PreTrainedModel, tmp_path: Path) -> None:
    """A configuration that leaves the size of a head to be guessed makes heads of another size when it is read."""
    small = narrow(large, **SIZES)
    size = attention(block_list(large)[0]).q_proj.out_features // 4
    small.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(again), logits(small))
    assert (again.config.head_dim, again.config.num_attention_heads, again.config.num_key_value_heads) == (size, 2, 1)
    assert again.config.intermediate_size == 20 and again.config.hidden_size == 32
    assert narrowed(again.config) == narrowed(small.config)
    assert narrowed(large.config) is None and large.config.num_attention_heads == 4
    assert "numbers" not in (tmp_path / "config.json").read_text()
    tied = large.get_input_embeddings().weight is large.get_output_embeddings().weight
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied


def test_generation_with_a_cache() -> None:
    """Keys and values of heads that went, left in the cache's sizes, show in generation only."""
    small = narrow(tiny("mistral"), **SIZES)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = small.generate(ids(12), use_cache=True, **settings)
    assert with_cache.shape == (2, 24)
    assert torch.equal(with_cache, small.generate(ids(12), use_cache=False, **settings))


def test_it_learns_and_shares_nothing(large: PreTrainedModel) -> None:
    """A student that shares a weight with its teacher trains the teacher too; one without gradients trains nothing."""
    before = [parameter.clone() for parameter in large.parameters()]
    small = narrow(large, **SIZES)
    theirs = {parameter.data_ptr() for parameter in large.parameters()}
    assert theirs.isdisjoint(parameter.data_ptr() for parameter in small.parameters())
    small(ids(), labels=ids()).loss.backward()
    for name, parameter in small.named_parameters():
        if any(part in name for part in ("q_proj", "k_proj.weight", "v_proj", "o_proj", "up_proj", "down_proj")):
            assert parameter.grad.abs().max() > 0, name
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    assert all(torch.equal(old, new) for old, new in zip(before, large.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in large.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tied: bool) -> None:
    """A head that is no longer tied doubles the largest matrix of a small model."""
    large = make_model(tie_word_embeddings=tied)
    small = narrow(large, **SIZES)
    assert (small.get_input_embeddings().weight is small.get_output_embeddings().weight) is tied
    assert torch.equal(small.get_output_embeddings().weight, large.get_output_embeddings().weight)


def test_state_and_type_are_kept() -> None:
    """Another type, hooks that stay, or a draw of random numbers that changes the run's, is a surprise."""
    large = tiny("llama").to(torch.bfloat16).train()
    large.model.layers[0].eval()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    small = narrow(large, **SIZES)
    assert torch.equal(torch.rand(1), expected)
    assert small.dtype == torch.bfloat16 and small.training and small.model.layers[0].training
    assert large.training and not large.model.layers[0].training
    assert not any(module._forward_pre_hooks for module in large.modules())
    assert small.generation_config == large.generation_config
    assert small.generation_config is not large.generation_config


@pytest.mark.parametrize(("asked", "left"), [("heads", "intermediate"), ("intermediate", "heads")])
def test_one_part_alone(asked: str, left: str) -> None:
    """What nobody asked to narrow must stay whole, and the report must say so."""
    large = tiny("llama")
    small = narrow(large, **{asked: SIZES[asked]})
    report = narrowed(small.config)
    assert getattr(report, left) is None and getattr(report, asked).kept == SIZES[asked]
    block = block_list(small)[0]
    sizes = (block.self_attn.q_proj.out_features // 8, block.mlp.up_proj.out_features)
    assert sizes == ((2, 48) if asked == "heads" else (4, 20))


def test_cut_and_narrowed() -> None:
    """Both reports must hold of the same student, in whichever order it was made."""
    large = tiny("llama", num_hidden_layers=6)
    small = narrow(keep_layers(large, [0, 2, 5]), **SIZES)
    other_way = keep_layers(narrow(large, **SIZES), [0, 2, 5])
    assert small.config.num_hidden_layers == 3 and small.config.kept_layers["numbers"] == [0, 2, 5]
    assert torch.equal(logits(small), logits(other_way))
    assert narrowed(small.config) == narrowed(other_way.config)
    assert len(narrowed(small.config).heads.shares) == 3


def test_narrowed_twice() -> None:
    """A report that forgets the first time calls half of a model nearly all of it."""
    large = tiny("llama")
    first = narrow(large, intermediate=32)
    twice = narrowed(narrow(narrow(first, intermediate=20), heads=2).config)
    once = narrowed(narrow(large, **SIZES).config)
    assert (twice.intermediate.kept, twice.intermediate.of) == (20, 48)
    assert twice.intermediate.shares == pytest.approx(once.intermediate.shares, abs=1e-3)
    assert twice.heads == once.heads


def test_shares() -> None:
    """The share of the weights is the one number of the report that a reader can compare."""
    large = tiny("llama")
    small, found = narrow(large, **SIZES), choose(large, **SIZES)
    for number, (old, new) in enumerate(zip(block_list(large), block_list(small), strict=True)):
        squares = [
            [
                sum(float(weight.square().sum()) for weight in part.parameters())
                for part in (block.self_attn, block.mlp)
            ]
            for block in (old, new)
        ]
        assert found.heads.shares[number] == pytest.approx(squares[1][0] / squares[0][0], rel=1e-5)
        assert found.intermediate.shares[number] == pytest.approx(squares[1][1] / squares[0][1], rel=1e-5)
        assert 20 / 48 < found.intermediate.shares[number] < 1
    assert narrowed(small.config).heads.shares == pytest.approx(found.heads.shares, abs=1e-4)


# --- what is refused


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({}, "neither `heads` nor `intermediate`"),
        ({"heads": 3}, r"heads: got 3; expected one of 2, 4 \(2 query heads share one key and value\)"),
        ({"heads": 0}, "heads: got 0; expected one of 2, 4"),
        ({"heads": 6}, "heads: got 6"),
        ({"heads": True}, "heads: got True"),
        ({"heads": 2.0}, "heads: got 2.0"),
        ({"intermediate": 0}, "intermediate: got 0; expected 1 to 48"),
        ({"intermediate": 49}, "intermediate: got 49"),
        ({"intermediate": "20"}, "intermediate: got '20'"),
    ],
)
def test_wrong_sizes(sizes: dict, words: str) -> None:
    """Half a group of heads, or more than there are, must be told before anything is copied."""
    with pytest.raises(ValueError, match=words):
        narrow(tiny("llama"), **sizes)


def test_sizes_that_the_configuration_refuses() -> None:
    """Llama's configuration wants heads that divide the hidden size; the message must not offer others."""
    large = tiny("llama", num_attention_heads=8, num_key_value_heads=8)
    with pytest.raises(ValueError, match="heads: got 3; expected one of 1, 2, 4, 8"):
        narrow(large, heads=3)


@pytest.mark.parametrize("kind", NEITHER)
@pytest.mark.parametrize("asked", ["heads", "intermediate"])
def test_other_blocks_are_refused(kind: str, asked: str) -> None:
    """A fused or convolutional projection that is cut as if it were a plain one gives noise."""
    with pytest.raises(ValueError, match=f"^{asked}: "):
        narrow(tiny(kind), **{asked: SIZES[asked]})


@pytest.mark.parametrize(
    ("kind", "settings", "asked", "words"),
    [
        ("phi3", {}, "heads", "but down_proj, gate_up_proj, input_layernorm, o_proj.*qkv_proj"),
        ("mixtral", {}, "intermediate", "has not one module with the linear layers gate_proj, up_proj, down_proj"),
        ("olmo2", {}, "heads", r"q_norm.weight should be \(32,\) and would be \(16,\)"),
        ("cohere", {"use_qk_norm": True}, "heads", r"q_norm.weight should be \(4, 8\)"),
        ("stablelm", {}, "heads", "q_proj.weight should be"),  # its heads are always the hidden size together
        ("gpt_oss", {}, "heads", "sinks should be"),
        ("diffllama", {"num_attention_heads": 8, "num_key_value_heads": 4}, "heads", "a logit should be"),
    ],
)
def test_what_hangs_on_the_number_is_refused(kind: str, settings: dict, asked: str, words: str) -> None:
    """Norms over all heads, sinks, and heads that work in pairs have weights that fit and a meaning that doesn't."""
    with pytest.raises(ValueError, match=words):
        narrow(other(kind, **settings), **{asked: 4 if kind == "diffllama" else SIZES[asked]})


def test_experts_keep_their_heads_narrowed() -> None:
    """Where only the MLPs can't be narrowed, the heads still can."""
    large = other("mixtral")
    assert narrow(large, heads=2).num_parameters() < large.num_parameters()


def test_adapters_are_refused() -> None:
    """The adapter's weights would be lost without a word."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="has an adapter"):
        narrow(adapted, heads=2)
