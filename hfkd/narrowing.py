"""A student with fewer attention heads and narrower MLPs than the model that it is copied from.

Which of them are kept is read from the weights alone, block by block; nothing here sees data, and nothing trains.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hfkd.student import as_read, decoder_blocks, kept_layers

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_SIZES = {"heads": "num_attention_heads", "intermediate": "intermediate_size"}


@dataclass(frozen=True)
class Part:
    """What was kept of the heads, or of the neurons of the MLPs.

    Args:
        kept: How many a block has now.
        of: How many it had.
        shares: For each block, what is left of the squared norm of the weights that belong to them.
        numbers: For each block, which were kept, counted from 0; None where it is read back from a configuration.
    """

    kept: int
    of: int
    shares: tuple[float, ...]
    numbers: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Narrowing:
    """What was kept of a model; None for a part that was left whole.

    Args:
        heads: Of the query heads.
        intermediate: Of the neurons between the two layers of the MLPs.
    """

    heads: Part | None = None
    intermediate: Part | None = None


def narrow(model: PreTrainedModel, *, heads: int | None = None, intermediate: int | None = None) -> PreTrainedModel:
    """Make a narrower model out of another: in each block only its strongest heads and neurons, all else whole.

    The hidden size, the vocabulary and the size of a head stay. Strength is magnitude, per block:

    - a neuron: the product of the largest absolute weights of its row of gate_proj, its row of up_proj (biases
      included) and its column of down_proj. A factor moved from up to down changes neither the function nor this.
    - a head: the largest absolute entry of O V, its columns of o_proj times its rows of v_proj (bias included), which
      is what it adds to a token if it looks at that token alone. Queries and keys don't count. Heads that share a key
      and a value go or stay together, by their sum.

    Magnitude as the measure of a whole unit: https://arxiv.org/abs/1608.08710; the product over weights that belong
    together: https://arxiv.org/abs/2305.11627. Peaks in the place of norms are ours: a few weights carry much of a
    language model (https://arxiv.org/abs/2411.07191), and norms overlook them. None of this sees activations, and
    the result must be trained: SmolLM2-135M's perplexity of 29 becomes 69 with 6 of 9 heads (three random draws: 76
    to 161; largest norms: 415) and 88 with 1,280 of 1,536 neurons (161 to 346; 144,142).

    Args:
        model: A causal LM without an adapter, whose blocks have q_proj, k_proj, v_proj and o_proj, and gate_proj,
            up_proj and down_proj; only the part that is narrowed need be so. It stays as it is. If layers are to be
            cut too, do that first (`hfkd.student.keep_layers`).
        heads: How many query heads a block keeps; a multiple of how many share one key and value. None: all.
        intermediate: How many neurons the MLP of a block keeps. None: all.

    Returns:
        A new model that shares no memory with the old one; the kept ones stand in their old order. `narrowed` reads
        from its configuration how many there are and how much of the weights; `choose` says which they are.

    Raises:
        ValueError: The model can't have these sizes, or its blocks are built in another way.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
        >>> large = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=24, num_key_value_heads=2))
        >>> small = narrow(large, heads=2, intermediate=10)
        >>> small.model.layers[0].mlp.up_proj, narrowed(small.config).heads.of
        (Linear(in_features=16, out_features=10, bias=False), 4)
    """
    found = choose(model, heads=heads, intermediate=intermediate)
    path, blocks = decoder_blocks(model)
    config = _narrow_config(model.config, heads, intermediate)
    config.narrowed = _record(found, narrowed(model.config))
    with torch.random.fork_rng(devices=[]):  # what is drawn here is written over
        small = type(model)._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    state = dict(model.state_dict())
    for _, name, dim, index in _cuts(model.config, path, blocks, found):
        state[name] = state[name].index_select(dim, index)
    _check_built(small, state)
    small.load_state_dict(state)
    if model.generation_config is not None:
        small.generation_config = copy.deepcopy(model.generation_config)
    small.to(model.device)
    _check_alike(model, small, found)
    return small.train(model.training)


def choose(model: PreTrainedModel, *, heads: int | None = None, intermediate: int | None = None) -> Narrowing:
    """Say which heads and neurons `narrow` would keep, by the same arguments.

    Returns:
        For each part that is narrowed, the numbers that are kept in each block, and their share of the weights.

    Raises:
        ValueError: As for `narrow`.
    """
    if hasattr(model, "peft_config") or getattr(model, "is_quantized", False):
        raise ValueError("the model has an adapter or quantised weights; narrow the plain model, then add them")
    if heads is None and intermediate is None:
        raise ValueError("neither `heads` nor `intermediate` is given; expected how many of them a block keeps")
    path, blocks = decoder_blocks(model)
    numbers: dict[str, list[list[int]]] = {}
    if heads is not None:
        count, group, size = _head_sizes(model.config, path, blocks)
        _check_heads(model.config, heads, count, group)
        strengths = (_head_strengths(_part(block, _ATTENTION)[1], size, group) for block in blocks)
        groups = [_strongest(strength, heads // group) for strength in strengths]
        numbers["heads"] = [[g * group + place for g in kept for place in range(group)] for kept in groups]
    if intermediate is not None:
        count = _neuron_count(model.config, path, blocks)
        if type(intermediate) is not int or not 1 <= intermediate <= count:
            raise ValueError(f"intermediate: got {intermediate!r}; expected 1 to {count}, the size of the MLPs")
        strengths = (_neuron_strengths(_part(block, _MLP)[1]) for block in blocks)
        numbers["intermediate"] = [_strongest(strength, intermediate) for strength in strengths]
    return _with_shares(model, path, blocks, numbers)


def narrowed(config: PreTrainedConfig) -> Narrowing | None:
    """What `narrow` left of a model's heads and neurons, all times taken together, without their numbers; or None."""
    record = getattr(config, "narrowed", None)
    if not record:
        return None
    cut = kept_layers(config)
    parts = {}
    for name, entry in record.items():
        shares = entry["shares"]
        if cut and len(shares) == cut[1] != len(cut[0]):  # blocks were taken out afterwards
            shares = [shares[number] for number in cut[0]]
        parts[name] = Part(int(entry["kept"]), int(entry["of"]), tuple(shares))
    return Narrowing(**parts)


def _record(found: Narrowing, before: Narrowing | None) -> dict[str, Any]:
    """What the configuration keeps: no numbers, which would be longer than all the rest of it."""
    record = {}
    for name in _SIZES:
        new, old = getattr(found, name), getattr(before, name, None)
        if new is not None and old is not None:  # shares of shares
            shares = tuple(now * then for now, then in zip(new.shares, old.shares, strict=True))
            new = replace(new, of=old.of, shares=shares)
        if (part := new or old) is not None:
            entry = asdict(part)
            del entry["numbers"]
            record[name] = {**entry, "shares": [round(share, 4) for share in part.shares]}
    return record


# --- where the heads and neurons are


def _part(block: nn.Module, names: Sequence[str]) -> tuple[str, nn.Module] | None:
    """The one module of a block that has plain linear layers of these names, and its own name."""
    found = [
        (name, module)
        for name, module in block.named_modules()
        if all(type(getattr(module, each, None)) is nn.Linear for each in names)
    ]
    return found[0] if len(found) == 1 else None


def _parts(key: str, path: str, blocks: nn.ModuleList, names: Sequence[str]) -> list[nn.Module]:
    """That module of every block."""
    found = [_part(block, names) for block in blocks]
    if None in found:
        block = blocks[found.index(None)]
        listed = sorted({name.rpartition(".")[2] for name, module in block.named_modules() if module._parameters})
        raise ValueError(
            f"{key}: {path}.{found.index(None)} ({type(block).__name__}) has not one module with the linear layers "
            f"{', '.join(names)}, but {', '.join(listed)}. Fused projections, experts and other kinds of block can't "
            f"be narrowed; leave {key} out, or take out blocks instead (keep_layers)"
        )
    return [module for _, module in found]


def _head_sizes(config: PreTrainedConfig, path: str, blocks: nn.ModuleList) -> tuple[int, int, int]:
    """How many query heads, how many of them share a key and value, and the size of a head; alike in all blocks."""
    text, parts = config.get_text_config(), _parts("heads", path, blocks, _ATTENTION)
    try:
        heads, size = text.num_attention_heads, getattr(text, "head_dim", None)
        shared = getattr(text, "num_key_value_heads", None) or heads
        size = size or text.hidden_size // heads
        expected = [[heads * size], [shared * size], [shared * size]]
    except (TypeError, RuntimeError) as error:  # a list with an entry a block, or settings of some blocks alone
        raise ValueError(f"heads: {type(text).__name__} has not the same heads in every block: {error}") from error
    rows = [sorted({getattr(part, name).out_features for part in parts}) for name in _ATTENTION[:3]]
    if rows != expected or heads % shared:
        raise ValueError(
            f"heads: by the configuration a block has {heads} query heads and {shared} key/value heads of size "
            f"{size}, and q_proj, k_proj and v_proj have {rows} rows; expected {expected}. Projections that hold "
            "something else than whole heads of one size can't be narrowed"
        )
    return heads, heads // shared, size


def _neuron_count(config: PreTrainedConfig, path: str, blocks: nn.ModuleList) -> int:
    """How many neurons the MLP of a block has; alike in all blocks, and what the configuration says."""
    found = sorted({part.gate_proj.out_features for part in _parts("intermediate", path, blocks, _MLP)})
    count = getattr(config.get_text_config(), "intermediate_size", None)
    if found != [count]:
        raise ValueError(
            f"intermediate: the MLPs have {found} neurons and the configuration's intermediate_size is {count!r}; "
            "expected the same number everywhere"
        )
    return count


def _check_heads(config: PreTrainedConfig, heads: int, count: int, group: int) -> None:
    """Refuse a number that the architecture or its configuration can't have; the message names those that it can."""
    possible = []
    for number in range(group, count + 1, group):
        with suppress(ValueError):  # some refuse what doesn't divide the hidden size, though nothing needs it
            _narrow_config(config, number, None)
            possible.append(number)
    if type(heads) is not int or heads not in possible:
        why = f" ({group} query heads share one key and value)" if group > 1 else ""
        raise ValueError(f"heads: got {heads!r}; expected one of {', '.join(map(str, possible))}{why}")


# --- which are kept


def _strongest(strength: Tensor, count: int) -> list[int]:
    """The numbers of the largest, in rising order; of equals the first."""
    return sorted(strength.argsort(descending=True, stable=True)[:count].tolist())


@torch.no_grad()
def _rows(layer: nn.Linear) -> Tensor:
    """The weight with the bias as one more column, since a unit's bias is its weight on a constant."""
    weight = layer.weight.float()
    return weight if layer.bias is None else torch.cat([weight, layer.bias.float()[:, None]], dim=1)


@torch.no_grad()
def _neuron_strengths(mlp: nn.Module) -> Tensor:
    inner = _rows(mlp.gate_proj).abs().amax(dim=1) * _rows(mlp.up_proj).abs().amax(dim=1)
    return inner * mlp.down_proj.weight.float().abs().amax(dim=0)


@torch.no_grad()
def _head_strengths(attention: nn.Module, size: int, group: int) -> Tensor:
    """For each key/value head the sum over its query heads of the largest entry of O V."""
    values = _rows(attention.v_proj).unflatten(0, (-1, size))  # [shared heads, size, H]
    outputs = attention.o_proj.weight.float().unflatten(1, (-1, size))  # [H, heads, size]
    heads = range(outputs.shape[1])
    peaks = torch.stack([(outputs[:, head] @ values[head // group]).abs().amax() for head in heads])
    return peaks.unflatten(0, (-1, group)).sum(dim=1)


def _with_shares(model: PreTrainedModel, path: str, blocks: nn.ModuleList, numbers: Mapping[str, Any]) -> Narrowing:
    """Add to the numbers what is left of the weights, and how many there were."""
    state, parts = model.state_dict(), {}
    for key, kept in numbers.items():
        of = getattr(model.config.get_text_config(), _SIZES[key])
        bare = Part(len(kept[0]), of, (), tuple(map(tuple, kept)))
        sums = [[0.0, 0.0] for _ in blocks]
        for number, name, dim, index in _cuts(model.config, path, blocks, Narrowing(**{key: bare})):
            squares = state[name].float().square()
            sums[number][0] += float(squares.index_select(dim, index).sum())
            sums[number][1] += float(squares.sum())
        parts[key] = replace(bare, shares=tuple(part / whole if whole else 1.0 for part, whole in sums))
    return Narrowing(**parts)


# --- the copy


def _narrow_config(config: PreTrainedConfig, heads: int | None, intermediate: int | None) -> PreTrainedConfig:
    """The configuration of the narrower model, as it will be when it is read from a file."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if heads is not None:
        count = text.num_attention_heads
        text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // count
        if hasattr(text, "num_key_value_heads"):
            text.num_key_value_heads = heads * (text.num_key_value_heads or count) // count
        text.num_attention_heads = heads
    if intermediate is not None:
        text.intermediate_size = intermediate
    return as_read(config, "sizes")


def _cuts(
    config: PreTrainedConfig, path: str, blocks: nn.ModuleList, found: Narrowing
) -> Iterator[tuple[int, str, int, Tensor]]:
    """The weights that get smaller: number of the block, name, dimension, and which of its places stay."""
    _, group, size = _head_sizes(config, path, blocks) if found.heads else (0, 1, 1)
    for number, block in enumerate(blocks):
        kept: list[tuple[Sequence[str], list[Tensor]]] = []
        if found.heads:
            heads = found.heads.numbers[number]
            queries, shared = _places(heads, size), _places([head // group for head in heads[::group]], size)
            kept.append((_ATTENTION, [queries, shared, shared, queries]))
        if found.intermediate:
            kept.append((_MLP, [torch.tensor(found.intermediate.numbers[number])] * 3))
        for names, indices in kept:
            inside, module = _part(block, names)
            for name, index in zip(names, indices, strict=True):
                leads_out, layer = name == names[-1], getattr(module, name)
                for each in ("weight",) if leads_out or layer.bias is None else ("weight", "bias"):
                    place = f"{path}.{number}.{inside}.{name}.{each}"
                    yield number, place, int(leads_out), index.to(layer.weight.device)


def _places(heads: Sequence[int], size: int) -> Tensor:
    return torch.cat([torch.arange(head * size, (head + 1) * size) for head in heads])


def _check_built(small: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Refuse an architecture that makes something else of the new sizes than what was cut."""
    for name, weight in small.state_dict().items():
        if name not in state or state[name].shape != weight.shape:
            expected = tuple(state[name].shape) if name in state else "nowhere"
            raise ValueError(_differs(small, name, expected, tuple(weight.shape)))


@torch.no_grad()
def _check_alike(model: PreTrainedModel, small: PreTrainedModel, found: Narrowing) -> None:
    """Hold the narrower model against the old one whose other heads and neurons say nothing, on a few tokens.

    Weights of the right sizes are not enough: heads may be compared, paired or scaled by their number.
    """
    text = model.config.get_text_config()
    ids = torch.randint(text.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0)).to(model.device)
    modes = {module: module.training for module in model.modules()}
    hooks = list(_silenced(model, found))
    try:
        expected = model.eval()(input_ids=ids, use_cache=False).logits.float()
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    logits = small.eval()(input_ids=ids, use_cache=False).logits.float()
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    worst = float((logits - expected).abs().max())
    if bool(expected.isfinite().all()) and not worst <= tolerance * max(1.0, float(expected.abs().max())):
        raise ValueError(_differs(small, "a logit", "as without the other heads and neurons", f"{worst:.3g} off"))


def _silenced(model: PreTrainedModel, found: Narrowing) -> Iterator[Any]:
    """Hooks that make nothing of what the heads and neurons that go send to the layer that leads out."""
    path, blocks = decoder_blocks(model)
    for _, name, dim, index in _cuts(model.config, path, blocks, found):
        if dim == 1:
            layer = model.get_submodule(name.removesuffix(".weight"))
            mask = torch.zeros(layer.in_features, dtype=layer.weight.dtype, device=index.device)
            mask[index] = 1
            yield layer.register_forward_pre_hook(lambda module, inputs, mask=mask: (inputs[0] * mask, *inputs[1:]))


def _differs(small: PreTrainedModel, name: str, expected: Any, got: Any) -> str:
    return (
        f"{type(small).__name__} can't be narrowed to these sizes: {name} should be {expected} and would be {got}. "
        "Its architecture ties something else to the number of heads or neurons; narrow the other of the two alone, "
        "or cut blocks only (keep_layers)"
    )
