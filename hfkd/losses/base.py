"""What a loss on tokens is. A new measure is one class with one method; chunks, masks, temperature and scale are dealt
with elsewhere.

A loss knows no model, prompt, tokenizer or number of processes: it reads a `TokenChunk` and says how many nats each
token costs.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from hfkd.rows import RowLayout
from hfkd.signal import DISTRIBUTION
from hfkd.support import TokenChunk


class TokenLoss(nn.Module, ABC):
    """A cost of each supervised token, in nats, neither divided nor masked.

    Subclasses may hold parameters; they are trained with the student.
    """

    key: ClassVar[str]
    """The name in recipes and logs: the class name in snake case."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What it asks a teacher for (see `hfkd.signal`)."""

    may_stand_alone: bool = True
    """Whether it makes sense as the only term of an objective."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.key = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()

    @abstractmethod
    def forward(self, chunk: TokenChunk) -> Tensor:
        """Return [n], the cost (nats) of each token of the chunk."""

    def groups(self, layout: RowLayout) -> Tensor | None:
        """Say which rows must be read together.

        Args:
            layout: Where the N rows come from.

        Returns:
            [N] group numbers, or None if every row can be read alone. A chunk then holds exactly one group.
        """
        return None

    def settings(self) -> dict[str, Any]:
        """The arguments that make this loss, as plain data."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The recipe form: `kind` (package.module:Class for a loss from elsewhere) and the settings."""
        cls = type(self)
        own = not cls.__module__.startswith("hfkd.losses")
        return {"kind": f"{cls.__module__}:{cls.__qualname__}" if own else cls.key, **self.settings()}


class Divergence(TokenLoss):
    """A measure between the student's and the teacher's distribution over the next token.

    Args:
        temperature: Divides the logits of both models before the softmax, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2, so that the gradient keeps its size (Hinton et al.,
            2015, https://arxiv.org/abs/1503.02531).
    """

    needs = frozenset({DISTRIBUTION})

    def __init__(self, temperature: float = 1.0, scale_by_temperature_squared: bool = True) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(
                f"{self.key}: temperature is {temperature}; expected a number above 0 (1 leaves the logits as they "
                f"are)."
            )
        self.temperature = float(temperature)
        self.scale_by_temperature_squared = scale_by_temperature_squared

    @abstractmethod
    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Measure each row.

        Args:
            student: [n, S] log-probabilities (nats), with a gradient.
            teacher: [n, S] log-probabilities (nats) on the same support, without one.

        Returns:
            [n] nats.
        """

    def forward(self, chunk: TokenChunk) -> Tensor:
        """Return [n], the divergence of each token at this loss's temperature."""
        values = self.between(*chunk.log_probs(self.temperature))
        if self.scale_by_temperature_squared and self.temperature != 1.0:
            values = values * self.temperature**2
        return values

    def settings(self) -> dict[str, Any]:
        """The temperature and whether its square is applied."""
        return {"temperature": self.temperature, "scale_by_temperature_squared": self.scale_by_temperature_squared}
