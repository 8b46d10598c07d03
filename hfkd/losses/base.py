"""What a loss on tokens is. A new measure is one class with one method; chunks, masks, temperature and scale are dealt
with elsewhere.

A loss knows no model, prompt, tokenizer or number of processes: it reads a `TokenChunk` and says how many nats each
token costs.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from hfkd.rows import RowLayout
from hfkd.schedules import Schedule, all_values, constant_or_schedule, described
from hfkd.signal import DISTRIBUTION
from hfkd.support import TokenChunk

Temperature = float | Mapping[str, Any] | Schedule
"""A number above 0, or a schedule or its recipe form."""


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

    why_not_alone: ClassVar[str] = "it doesn't tie each row to what the teacher says of it."
    """The reason, for the error message, where it doesn't."""

    auxiliary: ClassVar[bool] = False
    """Whether it has a head of its own: it is given the student's hidden states, and its gradient doesn't reach the
    student's output head.
    """

    fits_text: ClassVar[bool] = False
    """Whether it learns the token that the text really has, besides what a teacher says. On text that the student
    wrote itself such a loss is left out, and so is one that asks no teacher: it would teach the student whatever it
    says already.
    """

    reads_samples: ClassVar[bool] = False
    """Whether it can read a teacher that is known through drawn ids only (`TokenChunk.samples`)."""

    reads_other_vocabulary: ClassVar[bool] = False
    """Whether it can read a teacher that has another vocabulary (`TokenChunk.aligned`)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.key = recipe_key(cls.__name__)

    @property
    def learns_text(self) -> bool:
        """Whether it `fits_text`, or asks no teacher, so that there is nothing else that it could learn."""
        return self.fits_text or not self.needs

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

    def prepare(self, width: int, vocab_size: int) -> None:
        """Make the parameters whose shape depends on the student; called once, before training.

        Args:
            width: H of the student's last hidden states.
            vocab_size: V of the student's output head. A teacher with fewer ids cuts what a chunk shows to the first
                of them.
        """
        return None

    def read_head(self, weight: Tensor) -> None:
        """See the student's output head before the first step; comes after `prepare`.

        Args:
            weight: [V, H], the student's own; one that learns requires a gradient.
        """
        return None

    def set_step(self, step: int, total: int | None = None) -> None:
        """Hear how many optimizer steps were made, and how many the run has; for what changes on the way."""
        return None

    def settings(self) -> dict[str, Any]:
        """The arguments that make this loss, as plain data."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The recipe form: `kind` (package.module:Class for a loss from elsewhere) and the settings."""
        return {"kind": recipe_kind(type(self)), **self.settings()}


def recipe_key(class_name: str) -> str:
    """ForwardKL -> forward_kl."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", class_name).lower()


def docstring_section(cls: type, name: str) -> str:
    """What a loss's docstring says under a heading (`Formula`, `Cost`, ...), in one line; empty if nothing."""
    found = re.search(rf"^{name}:\n((?:[ ]+.*\n?|\n)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    return " ".join(found.group(1).split()) if found else ""


def recipe_kind(cls: type) -> str:
    """How a recipe names a loss: its key, or package.module:Class for one from elsewhere."""
    own = not cls.__module__.startswith("hfkd.losses")
    return f"{cls.__module__}:{cls.__qualname__}" if own else cls.key


class Divergence(TokenLoss):
    """A measure between the student's and the teacher's distribution over the next token.

    Args:
        temperature: Divides the logits of both models before the softmax, > 0; a number, or a schedule such as
            `{"schedule": "linear", "start": 4.0, "end": 1.0}`.
        scale_by_temperature_squared: Multiply by temperature ** 2, so that the gradient keeps its size (Hinton et al.,
            2015, https://arxiv.org/abs/1503.02531).
    """

    needs = frozenset({DISTRIBUTION})

    def __init__(self, temperature: Temperature = 1.0, scale_by_temperature_squared: bool = True) -> None:
        super().__init__()
        cls = type(self)
        if cls.between is Divergence.between and cls.compare is Divergence.compare:
            raise TypeError(
                f"{cls.__name__} measures nothing yet: write its method `between(student, teacher) -> [n]`."
            )
        self._temperature = constant_or_schedule(temperature, f"{self.key}: temperature")
        if not min(all_values(self._temperature)) > 0:
            raise ValueError(
                f"{self.key}: temperature is {temperature}; expected a number above 0 (1 leaves the logits as they "
                f"are)."
            )
        self.temperature = all_values(self._temperature)[0]
        self.scale_by_temperature_squared = scale_by_temperature_squared

    @property
    def scheduled(self) -> bool:
        """Whether the temperature changes on the way."""
        return isinstance(self._temperature, Schedule)

    def set_step(self, step: int, total: int | None = None) -> None:
        """Put the temperature of this step in force."""
        if isinstance(self._temperature, Schedule):
            try:
                self.temperature = self._temperature.at(step, total)
            except ValueError as error:
                raise ValueError(f"The temperature of {self.key}: {error}.") from error

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Measure each row. The one method to write.

        Args:
            student: [n, S] log-probabilities (nats), with a gradient.
            teacher: [n, S] log-probabilities (nats) on the same support, without one.

        Returns:
            [n] nats.
        """
        raise NotImplementedError(f"{type(self).__name__} needs more than two distributions: call it with a chunk.")

    def compare(self, chunk: TokenChunk) -> Tensor:
        """Return [n], the divergence before its scale; override it where two distributions don't say enough."""
        return self.between(*chunk.log_probs(self.temperature))

    def forward(self, chunk: TokenChunk) -> Tensor:
        """Return [n], the divergence of each token at this loss's temperature."""
        values = self.compare(chunk)
        if self.scale_by_temperature_squared and self.temperature != 1.0:
            values = values * self.temperature**2
        return values

    def settings(self) -> dict[str, Any]:
        """The temperature and whether its square is applied."""
        return {
            "temperature": described(self._temperature),
            "scale_by_temperature_squared": self.scale_by_temperature_squared,
        }
