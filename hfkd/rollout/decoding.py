"""The two decisions of a decoding loop that have to be taken row by row: where a row ends, and which token it draws.

Both plug into `generate` of transformers. They know token ids and the tokenizer, and nothing of the model or of the
prompts' meaning.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

from hfkd.rollout.base import Completion, GenerationSettings

_SPARE_TOKENS = 4


def eos_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that the model or the tokenizer calls the end: chat models often name theirs in one place only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    declared = base.generation_config.eos_token_id
    ids = declared if isinstance(declared, list | tuple) else [declared]
    return list(dict.fromkeys(int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None))


class TextEnds:
    """Where a text ends: at an end-of-sequence token or a stop string.

    Args:
        tokenizer: Decodes the tokens.
        stop: Stop strings.
        eos_ids: Tokens that end a row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], eos_ids: Sequence[int]) -> None:
        self.tokenizer, self.stop, self.eos_ids = tokenizer, tuple(stop), frozenset(eos_ids)
        # Special tokens are no part of the text, unless the user wants to stop at one of them.
        specials = tokenizer.all_special_tokens
        self._skip_special_tokens = not any(special in text for special in specials for text in self.stop)
        # A token is at least one byte long, so this many of the last ones hold any stop string just completed.
        self.tail = max((len(text.encode()) for text in self.stop), default=0) + _SPARE_TOKENS

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text exactly as they stand."""
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def ended(self, tail: Sequence[int]) -> bool:
        """Whether the last token of these (the `tail` last new ones of a row) ends the row."""
        if tail[-1] in self.eos_ids:
            return True
        if not self.stop:
            return False
        text = self.decode(tail)
        return any(stop in text for stop in self.stop)

    def completion(self, ids: list[int], finished: bool) -> Completion:
        """Cut the text of a row, whose ids already end where the row ended."""
        text = self.decode(ids[:-1] if ids and ids[-1] in self.eos_ids else ids)
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        return Completion(ids=ids, text=text[: min(found)] if found else text, finished=finished)


class RowEnds(StoppingCriteria):
    """Ends each row by itself and remembers where; the other rows go on.

    `generate` stops when all rows have ended. What it writes into ended rows meanwhile is cut off by `completions`.

    Args:
        ends: What ends a row.
        rows: Rows of the batch.
        prompt_width: Columns of the padded prompts.
    """

    def __init__(self, ends: TextEnds, rows: int, prompt_width: int) -> None:
        self.ends, self.prompt_width = ends, prompt_width
        self.lengths: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        """Look at the newest token of the rows that still run.

        Args:
            input_ids: [B, prompt_width + new] tokens so far.
            scores: Unused.
            **kwargs: Unused.

        Returns:
            [B] bool, True where the row has ended.
        """
        new = input_ids.shape[1] - self.prompt_width
        tails = input_ids[:, -min(new, self.ends.tail) :].tolist()
        for row, tail in enumerate(tails):
            if self.lengths[row] is None and self.ends.ended(tail):
                self.lengths[row] = new
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)

    def completions(self, sequences: Tensor) -> list[Completion]:
        """Cut the rows where they ended.

        Args:
            sequences: [B, prompt_width + new] what `generate` returned.
        """
        new = sequences[:, self.prompt_width :].tolist()
        pairs = zip(new, self.lengths, strict=True)
        return [self.ends.completion(ids[:length], length is not None) for ids, length in pairs]


class SeededSampling(LogitsProcessor):
    """Draws each row's tokens from random numbers of its own.

    The draw is a function of the seed and of the prompt, not of the batch that the prompt happens to be in: another
    batch size, another order or a resumed run gives the same samples. It leaves one token with a score above minus
    infinity, so greedy decoding takes it.

    Args:
        draws: [B, max_new_tokens] float64 numbers in [0, 1), one for each token to come.
        prompt_width: Columns of the padded prompts.
        temperature: Divides the logits, above 0.
        top_p: Sample from the smallest set of tokens that holds this probability.
    """

    def __init__(self, draws: Tensor, prompt_width: int, temperature: float, top_p: float) -> None:
        self.draws, self.prompt_width, self.temperature, self.top_p = draws, prompt_width, temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Choose by the inverse of the cumulative distribution.

        Args:
            input_ids: [B, T] tokens so far.
            scores: [B, V] logits.

        Returns:
            [B, V], 0 at the chosen token and minus infinity elsewhere.
        """
        # Float32 can't tell the 150,000th cumulative probability from 1; MPS has nothing better.
        precision = torch.float32 if scores.device.type == "mps" else torch.float64
        probabilities = (scores.to(precision) / self.temperature).softmax(dim=-1)
        if self.top_p < 1:
            ranked, ids = probabilities.sort(dim=-1, descending=True)
            ranked = ranked.where(ranked.cumsum(dim=-1) - ranked < self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, ids, ranked)
        cumulative = probabilities.cumsum(dim=-1)
        draw = self.draws[:, input_ids.shape[1] - self.prompt_width, None].to(cumulative)
        chosen = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True)
        chosen = chosen.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


def draws_for(prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> Tensor:
    """Make the random numbers of each prompt; a prompt that comes several times gets others each time.

    Returns:
        [number of prompts, max_new_tokens] float64 in [0, 1), on the CPU.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    rows = []
    for prompt in prompts:
        key = tuple(prompt)
        digest = hashlib.sha256(repr((settings.seed, seen[key], key)).encode()).digest()
        seen[key] += 1
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        rows.append(torch.rand(settings.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)
