"""The student: loading it, cutting it out of a larger model, giving it an adapter, and checking its output head.

Nothing here trains.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from hfkd.batch import View
from hfkd.config import DistillationConfig
from hfkd.loading import load_causal_lm
from hfkd.packing import check_segments, drop_padding, reads_flat
from hfkd.rows import Head, decode, input_device
from hfkd.states import nearest_lists
from hfkd.teachers import evaluating

_OWN_NUMBER = ("layer_idx", "layer_id", "layer_number")
# Of a block's plain attributes those that say nothing of what it computes.
_INCIDENTAL = (*_OWN_NUMBER, "training", "gradient_checkpointing")
_PREPARED = ("_is_accelerate_prepared", "_original_forward", "forward")
"""What accelerate leaves in a model that it has prepared."""


def make_student(model: Any, peft_config: Any, args: DistillationConfig) -> nn.Module:
    """Load the student if it was given by name, and put an adapter on it if one was asked for.

    Args:
        model: A causal LM, a PEFT model, or a hub id or folder.
        peft_config: The adapter, or None.
        args: Its `model_init_kwargs` go to `from_pretrained`; weights are float32 unless they say otherwise.

    Raises:
        ValueError: The model has an adapter already.
        HeadError: Its output head can't be read; said here, before anything is trained.
        PaddingFreeError: `padding_free` is on, and it can't keep texts in one row apart.
    """
    if isinstance(model, str):
        model = load_causal_lm(model, "the student", **{"dtype": torch.float32, **(args.model_init_kwargs or {})})
    if peft_config is not None:
        if hasattr(model, "peft_config"):
            raise ValueError(
                "The model has an adapter already, and a `peft_config` was passed too. Pass one of the two."
            )
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    Head.of(model)
    if args.padding_free:
        drop_padding(model)
    return model


def pad_token(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The id to pad with. Padding is masked and never learned, so any id will do; EOS where there is none."""
    if tokenizer is None:
        return 0
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token is not None), 0)


def check_head(model: nn.Module, view: View, padding_free: bool = False, tokens: int = 16) -> None:
    """Hold the logits rebuilt from the head against the model's own, on the first tokens of the first row.

    Args:
        model: In eval mode.
        view: What it reads.
        padding_free: Whether it will read rows without padding; then that is checked, too.
        tokens: How many tokens to run.

    Raises:
        HeadError: They differ.
        PaddingFreeError: It doesn't keep the texts in such a row apart.
    """
    if padding_free and reads_flat(model):
        check_segments(model, view)
    length = int(view.attention_mask[0].sum())
    first = int(view.attention_mask[0].long().argmax())
    ids = view.input_ids[:1, first : first + min(tokens, length)].to(input_device(model))
    mask = torch.ones_like(ids)
    hidden = decode(model, ids, mask).last_hidden_state[0]
    logits = model(input_ids=ids, attention_mask=mask).logits[0].to(hidden.device)
    head = Head.of(model)  # gathered by all processes, whatever the numbers of one of them are
    if bool(torch.isfinite(logits).all()):  # if not, the loss will be no number, and its error says more
        head.check(hidden, logits)


def keep_layers(model: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """Make a smaller model out of some of the decoder blocks of another; all else is copied whole.

    Args:
        model: A causal LM without an adapter; it stays as it is.
        layers: Numbers of the blocks to keep, from 0 and rising; or how many to keep, spread evenly from the first
            block to the last, which are always kept.

    Returns:
        A new model that shares no memory with the old one. Its configuration has the new number of blocks, and what
        it lists block by block, cut alike; `kept_layers` reads from it what was kept.

    Raises:
        ValueError: The model hasn't these blocks, or its architecture gives a block another task by its number.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> large = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=6))
        >>> small = keep_layers(large, 3)
        >>> small.config.num_hidden_layers, kept_layers(small.config)
        (3, ([0, 3, 5], 6))
    """
    if hasattr(model, "peft_config") or getattr(model, "is_quantized", False):
        raise ValueError("the model has an adapter or quantised weights; cut the plain model, then add them")
    path, blocks = decoder_blocks(model)
    numbers = _numbers(layers, len(blocks))
    config = _cut_config(model.config, numbers, len(blocks))
    with torch.random.fork_rng(devices=[]):  # what is drawn here is written over
        small = type(model)._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    _check_alike(blocks, decoder_blocks(small)[1], numbers)
    small.load_state_dict(dict(_renamed(model.state_dict(), f"{path}.", numbers)))
    if model.generation_config is not None:
        small.generation_config = copy.deepcopy(model.generation_config)
    return small.to(model.device).train(model.training)


def kept_layers(config: PreTrainedConfig) -> tuple[list[int], int] | None:
    """What `keep_layers` kept: the numbers that the blocks had, and how many there were; None for a whole model."""
    kept = getattr(config, "kept_layers", None)
    return (list(kept["numbers"]), int(kept["of"])) if kept else None


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks, and what the names of their weights begin with.

    Raises:
        ValueError: There is no one list of them.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = nearest_lists(model, count)
    if model.config.is_encoder_decoder or len(found) != 1:
        raise ValueError(f"{type(model).__name__} has no one list of {count} decoder blocks, so it can't be cut")
    return found[0]


def _numbers(layers: int | Sequence[int], count: int) -> list[int]:
    """The block numbers that are meant, held against how many there are."""
    if isinstance(layers, int) and not isinstance(layers, bool):
        if not 2 <= layers <= count:
            raise ValueError(
                f"got {layers}; expected 2 to {count} of the {count} blocks (the first and the last are always kept; "
                "[0] keeps the first alone)"
            )
        return [(2 * place * (count - 1) + layers - 1) // (2 * (layers - 1)) for place in range(layers)]
    numbers = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else []
    whole = bool(numbers) and all(type(number) is int and 0 <= number < count for number in numbers)
    if not whole or numbers != sorted(set(numbers)):
        raise ValueError(
            f"got {layers!r}; expected numbers from 0 to {count - 1}, each larger than the one before: the model "
            f"has {count} blocks"
        )
    return numbers


def _cut_config(config: PreTrainedConfig, numbers: Sequence[int], count: int) -> PreTrainedConfig:
    """The configuration of the smaller model, as it will be when it is read from a file."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if not isinstance(value, list | tuple):
            continue
        if name == "mlp_only_layers":  # numbers of blocks, not an entry for each
            setattr(text, name, [new for new, old in enumerate(numbers) if old in value])
        elif len(value) == count and any(word in name for word in ("layer", "block", "heads", "intermediate")):
            setattr(text, name, [value[number] for number in numbers])
    text.num_hidden_layers = len(numbers)
    config.kept_layers = {"numbers": list(numbers), "of": count}
    return as_read(config, "blocks")


def as_read(config: PreTrainedConfig, what: str) -> PreTrainedConfig:
    """A configuration that was changed, as it will be when it is read from a file.

    Args:
        config: With its changes.
        what: Was changed, for the message.

    Raises:
        ValueError: It can't be read back.
    """
    try:
        read = type(config).from_dict(config.to_dict())
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{type(config).__name__} can't describe a model of these {what}: {error}") from error
    read._name_or_path = config._name_or_path
    return read


def _check_alike(before: nn.ModuleList, after: nn.ModuleList, numbers: Sequence[int]) -> None:
    """Refuse a block that does something else under its new number: another kind of attention, another scale."""
    for new, old in enumerate(numbers):
        pairs = zip(before[old].named_modules(), after[new].named_modules(), strict=False)
        for (name, module), (other_name, other) in pairs:
            if (name, type(module)) != (other_name, type(other)):
                raise ValueError(_moved(old, new, name, type(module).__name__, type(other).__name__))
            for key, value in vars(module).items():
                plain = isinstance(value, int | float | str | None) and key not in _INCIDENTAL and key[0] != "_"
                if plain and getattr(other, key, value) != value:
                    raise ValueError(_moved(old, new, f"{name}.{key}".strip("."), value, getattr(other, key)))


def _moved(old: int, new: int, name: str, value: Any, other: Any) -> str:
    return (
        f"block {old} would become block {new}, and this architecture decides by the number what a block does: "
        f"{name} is {value} and would be {other}; keep blocks whose new number means the same, or the first ones"
    )


def _renamed(state: Mapping[str, Tensor], prefix: str, numbers: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names that they have in the smaller model."""
    places = {str(old): str(new) for new, old in enumerate(numbers)}
    for name, weight in state.items():
        if not name.startswith(prefix):
            yield name, weight
            continue
        number, _, rest = name.removeprefix(prefix).partition(".")
        if number in places:
            yield f"{prefix}{places[number]}.{rest}", weight


@contextmanager
def as_it_was(trainer: Trainer) -> Iterator[None]:
    """Leave no trace of an evaluation in a trainer's model: its modes, and that accelerate has prepared it.

    An evaluation before training marks the model as prepared, and training then takes it as it is: on several
    processes each would train alone, without averaging a gradient.

    Args:
        trainer: Outside of training or inside.
    """
    model, accelerator = trainer.model, trainer.accelerator
    fresh = not accelerator._models and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    kept = {name: model.__dict__[name] for name in _PREPARED if name in model.__dict__}
    wrapped = trainer.model_wrapped
    try:
        with evaluating(model):
            yield
    finally:
        if fresh:
            for name in _PREPARED:
                model.__dict__.pop(name, None)
            model.__dict__.update(kept)
            accelerator._models.clear()
            trainer.model_wrapped = wrapped


@contextmanager
def as_published(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it will answer where it is loaded: accelerate puts autocast around the forward of a student that is
    trained in mixed precision, and a figure of the trained model would be compared with one that had none.

    Args:
        model: Unwrapped; an adapter's base never had autocast around it.
    """
    wrapped = model.__dict__.pop("forward", None) if "_original_forward" in model.__dict__ else None
    try:
        yield model
    finally:
        if wrapped is not None:
            model.forward = wrapped
