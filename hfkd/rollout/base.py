"""What it means to let a model write: the settings, a completion, and the interface that every generator fills.

Knows no model library and no data set: prompts come in as token ids and completions go out as ids and text.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are drawn.

    Attributes:
        max_new_tokens: Upper limit of a completion, in tokens.
        stop: Strings that end a row; text from the first of them on is cut off.
        temperature: 0 takes the most probable token (greedy), above 0 samples.
        top_p: Sample from the smallest set of tokens that holds this probability; 1 is the whole vocabulary.
        batch_size: Rows that are generated together.
        seed: Decides the samples, together with the prompt; unused when greedy, like `top_p`.
    """

    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that could only fail later, or be taken for something else."""
        if isinstance(self.stop, str):
            raise ValueError(f"stop is the text {self.stop!r}; expected a list of strings, like [{self.stop!r}].")
        object.__setattr__(self, "stop", tuple(self.stop))
        if "" in self.stop:
            raise ValueError(
                "stop holds an empty string, which ends every completion at once; take it out of the list."
            )
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; expected 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected a probability above 0 and at most 1.")


@dataclass(frozen=True)
class Completion:
    """What a model wrote behind one prompt.

    Attributes:
        ids: The new tokens as they were generated, up to and with the token that ended the row (EOS, or the last one
            of a stop string).
        text: The decoded tokens without EOS, up to the first stop string. Surrounding spaces are kept.
        finished: True where EOS or a stop string was reached, False where the limit of tokens cut the row.
    """

    ids: list[int]
    text: str
    finished: bool


class Rollout(ABC):
    """Lets a model write behind prompts. One method to fill in.

    Attributes:
        settings: How completions are drawn, where it has settings.
        any_model: Whether it writes with whatever model it is handed; False for an engine of its own, which follows
            one model's weights.
    """

    settings: GenerationSettings
    any_model: bool = True

    @abstractmethod
    def generate(
        self, model: nn.Module, prompts: Sequence[list[int]], description: str | None = None
    ) -> list[Completion]:
        """Write behind each prompt.

        Args:
            model: The model whose present weights write (a PEFT model with its adapter on or off, as it is handed in).
            prompts: Token ids, one list each, none of them empty.
            description: Words for a progress bar; None shows no bar.

        Returns:
            One completion for each prompt, in the order of the prompts.
        """

    def stream(
        self, model: nn.Module, prompts: Sequence[list[int]], description: str | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """Yield `(index of the prompt, completion)` as soon as each is there, in any order; by default at the end."""
        yield from enumerate(self.generate(model, prompts, description))

    @contextmanager
    def at_step(self, step: int, seed: int = 0) -> Iterator[None]:
        """Write as at a step of a training: with samples of that step's own, and by the weights as they are by then.

        Inside, `settings.seed` is a function of the settings' own seed, of `seed` and of the step, so the samples
        change from step to step and a resumed run draws the same ones again.

        Args:
            step: The step, counted from 0.
            seed: Of the training.
        """
        settings = getattr(self, "settings", None)
        if not isinstance(settings, GenerationSettings):
            yield
            return
        digest = hashlib.sha256(f"{settings.seed}/{seed}/{step}".encode()).digest()
        self.settings = replace(settings, seed=int.from_bytes(digest[:7], "little"))
        try:
            yield
        finally:
            self.settings = settings
