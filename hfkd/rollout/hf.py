"""Generation with the model in hand, through `generate` of transformers.

Prompts are sorted by length, padded on the left and generated batch by batch; a prefix that all of them share is run
once. The model's own generation defaults (penalties, sampling flags) are left out of it, and whatever is switched for
generation is switched back afterwards. Knows nothing of adapters: the weights that are in force when it is called are
the ones that write.

A model whose weights are spread over the processes is run by all of them together, whatever each of them has to write:
they agree on the number of batches and on the prefix, one that has ended goes on until the last one has, and one that
has nothing to write lends its shards.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import PartialState
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from hfkd.distributed import largest_and_smallest, run_inside
from hfkd.errors import HeadError, UnsupportedCache
from hfkd.prefix import SharedPrefix, common_prefix
from hfkd.rollout.base import Completion, GenerationSettings, Rollout
from hfkd.rollout.decoding import RowEnds, SeededSampling, TextEnds, draws_for, eos_ids
from hfkd.rows import input_device, position_count
from hfkd.sharding import is_sharded

logger = logging.getLogger(__name__)


class HFRollout(Rollout):
    """Generates with a transformers model.

    Args:
        tokenizer: Decodes what was written, and names the padding token.
        settings: How completions are drawn.
        reuse_prefix: Run the tokens that all prompts begin with once, where the architecture's cache allows it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings | None = None, reuse_prefix: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings or GenerationSettings()
        self.reuse_prefix = reuse_prefix

    def generate(
        self, model: nn.Module, prompts: Sequence[list[int]], description: str | None = None
    ) -> list[Completion]:
        """Write behind each prompt; see `Rollout.generate`.

        Raises:
            ValueError: A prompt is empty, or is too long for the model.
        """
        completions = dict(self.stream(model, prompts, description))
        return [completions[index] for index in range(len(prompts))]

    def stream(
        self, model: nn.Module, prompts: Sequence[list[int]], description: str | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """Yield `(index of the prompt, completion)` batch by batch, the longest prompts first. Of a sharded model all
        processes must read to the end.
        """
        size = self.settings.batch_size
        ends = range(size, len(prompts) + size, size)
        if is_sharded(model):
            ends = range(size, size * (largest_and_smallest(len(ends))[0] + 1), size)
        if not ends:
            return
        base = _base_model(model)
        if prompts:
            self._check(base, prompts)
        prefix = self._shared_prefix(model, base, prompts)
        draws = draws_for(prompts, self.settings) if prompts and self.settings.temperature > 0 else None
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        with _progress(description, len(prompts)) as advance:
            for end in ends:
                chosen = order[end - size : end]
                if not chosen:
                    self._lend(model, base)
                    continue
                rows = [prompts[index] for index in chosen]
                completions = self._batch(model, base, rows, prefix, None if draws is None else draws[chosen])
                advance(len(chosen))
                yield from zip(chosen, completions, strict=True)

    def _check(self, base: PreTrainedModel, prompts: Sequence[list[int]]) -> None:
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths) == 0:
            raise ValueError(
                f"Prompt {lengths.index(0)} holds no token, and a model can't write behind nothing. Give it some "
                "text, or a BOS token."
            )
        limit = position_count(base)
        if limit is not None and max(lengths) + self.settings.max_new_tokens > limit:
            raise ValueError(
                f"Prompt {lengths.index(max(lengths))} has {max(lengths)} tokens and may be answered with "
                f"{self.settings.max_new_tokens} more, but {type(base).__name__} has {limit} positions. Use fewer or "
                "shorter demonstrations, or a smaller max_new_tokens; nothing is cut in silence."
            )

    def _shared_prefix(
        self, model: nn.Module, base: PreTrainedModel, prompts: Sequence[list[int]]
    ) -> SharedPrefix | None:
        """Run what all prompts begin with, or return None where that's too little or isn't possible."""
        ids: list[int] = []
        if self.reuse_prefix and len(prompts) > 1:
            # At least one token of each prompt is left to be run, because its last row predicts the first new token.
            ids = common_prefix(prompts, limit=min(len(prompt) for prompt in prompts) - 1)
        long_enough = len(ids) >= SharedPrefix.MINIMUM or not prompts
        if is_sharded(model):  # all run one, or none
            long_enough = bool(largest_and_smallest(int(long_enough))[1])
        if not long_enough:
            return None
        prefix = SharedPrefix(ids or [0])
        try:
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                raise UnsupportedCache(
                    "The adapter puts virtual tokens before each prompt; every prompt is run whole."
                )
            with generation_mode(model):
                cache = run_inside(model, model, prefix.cache_for, model, 1)
            longest = max(map(len, prompts), default=0) + self.settings.max_new_tokens
            _check_padding_is_free(base, cache, longest)
        except (UnsupportedCache, HeadError) as problem:
            _warn_once(str(problem))
            return None
        return prefix

    def _batch(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        rows: list[list[int]],
        prefix: SharedPrefix | None,
        draws: Tensor | None,
    ) -> list[Completion]:
        config = _generation_config(base, self.tokenizer, self.settings)
        input_ids, mask = _pad_left(rows, config.pad_token_id, len(prefix) if prefix else 0)
        ends = RowEnds(TextEnds(self.tokenizer, self.settings.stop, config.eos_token_id or ()), *input_ids.shape)
        device = input_device(base)
        arguments: dict[str, Any] = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
        if draws is not None:
            sampling = SeededSampling(draws, input_ids.shape[1], self.settings.temperature, self.settings.top_p)
            arguments["logits_processor"] = LogitsProcessorList([sampling])
        with generation_mode(model), torch.no_grad():
            if prefix is not None:
                arguments["past_key_values"] = prefix.cache_for(model, len(rows))
            arguments |= {"generation_config": config, "stopping_criteria": StoppingCriteriaList([ends])}
            sequences = _generate(model, arguments)
        return ends.completions(sequences)

    def _lend(self, model: nn.Module, base: PreTrainedModel) -> None:
        """Take part in a batch of the other processes: one token behind one token, and then until they have ended."""
        config = _generation_config(base, self.tokenizer, self.settings)
        config.max_new_tokens = 1
        ids = torch.tensor([[config.pad_token_id]], device=input_device(base))
        with generation_mode(model), torch.no_grad():
            _generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "generation_config": config})


@contextmanager
def generation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into the state that generation needs, and put it back, after an exception too.

    In force inside: eval mode, the cache on, gradient checkpointing off, and an empty generation config, so that no
    default of a model's author (a repetition penalty, for instance) reaches results that are called greedy.
    """
    base = _base_model(model)
    training = [(module, module.training) for module in model.modules()]
    checkpointing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    generation_config, use_cache = base.generation_config, getattr(base.config, "use_cache", None)
    try:
        model.eval()
        for module in checkpointing:
            module.gradient_checkpointing = False
        base.config.use_cache = True
        base.generation_config = GenerationConfig()
        yield
    finally:
        base.generation_config = generation_config
        base.config.use_cache = use_cache
        for module in checkpointing:
            module.gradient_checkpointing = True
        for module, mode in training:
            module.training = mode


def _generate(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """`generate` where the weights that no block holds are gathered, and on all processes for as many tokens."""
    together = is_sharded(model) and PartialState().num_processes > 1
    return run_inside(model, model, lambda: model.generate(**arguments, synced_gpus=together))


def _base_model(model: nn.Module) -> PreTrainedModel:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "generate") or not hasattr(base, "generation_config"):
        raise ValueError(
            f"{type(model).__name__} can't generate; expected a causal LM of transformers or a PEFT model around one. "
            "If it is wrapped for distributed training, unwrap it first."
        )
    return base


def _generation_config(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings
) -> GenerationConfig:
    ends = eos_ids(base, tokenizer)
    pad_id = tokenizer.pad_token_id
    if pad_id is None:  # any token will do: it is masked on the left, and cut off on the right
        pad_id = ends[0] if ends else 0
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,  # samples are drawn by SeededSampling
        num_beams=1,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=pad_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def _pad_left(rows: list[list[int]], pad_id: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Pad between the shared prefix and the rest of each row; [B, T] ids and mask. Positions follow the mask."""
    width = max(len(row) for row in rows)
    gaps = [width - len(row) for row in rows]
    ids = [row[:prefix] + [pad_id] * gap + row[prefix:] for row, gap in zip(rows, gaps, strict=True)]
    mask = [[1] * prefix + [0] * gap + [1] * (width - prefix - gap) for gap in gaps]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def _check_padding_is_free(base: PreTrainedModel, cache: Cache, longest: int) -> None:
    """Padding behind the prefix is harmless only where distance goes by position, not by place in the cache."""
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise UnsupportedCache(f"{type(base).__name__} takes no position ids; every prompt is run whole.")
    windows = [layer.sliding_window for layer in cache.layers if getattr(layer, "sliding_window", None)]
    if windows and longest > min(windows):
        raise UnsupportedCache(
            f"{type(base).__name__} looks back {min(windows)} tokens in some layers and a text may have {longest}; "
            "every prompt is run whole."
        )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("The prompts' shared prefix isn't reused in generation. %s", message)


@contextmanager
def _progress(description: str | None, total: int) -> Iterator:
    """A progress bar in prompts; yields the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) if description else nullcontext() as bar:
        task = bar.add_task(description, total=total) if bar else None
        yield lambda count: bar.advance(task, count) if bar else None
