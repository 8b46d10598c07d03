"""A step's batches changed before their tokens are counted: what a reviser is.

A reviser sees all micro-batches of a step at once, after the text was written, and returns as many. What it leaves
unsupervised isn't counted, so the loss stays a mean over what is learned. Knows the trainer it is attached to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


class Reviser(ABC):
    """Changes what is learned of a step's batches. `revise` is the method to write.

    Attributes:
        trainer: The `DistillationTrainer`, once attached; `hfkd.reading.read_batch(self.trainer, inputs)` says what
            student and teacher think of a batch.
        needs_teacher: Whether a recipe without a teacher is refused.
    """

    needs_teacher: bool = False

    trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """Hear whose batches these are, once student and teacher are prepared. Override it to check what is needed,
        and call this one.

        Raises:
            ValueError: The trainer lacks what this reviser needs.
        """
        self.trainer = trainer

    def check(self, dataset: Any) -> None:
        """Look at the examples before any model is asked.

        Args:
            dataset: A `DistillationDataset`.

        Raises:
            ValueError: They lack what this reviser goes by.
        """
        return None

    @abstractmethod
    def revise(self, batches: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """Give new batches for the old ones; all processes call it at once.

        Args:
            batches: What `Batch.to_inputs` returns, one for each micro-batch.
            step: The optimizer step, counted from 0.

        Returns:
            As many batches. Both views of each must supervise the same ids, as before.
        """

    def figures(self) -> dict[str, tuple[float, float]]:
        """Of the last step on this process, `(numerator, denominator)` by the name that the log shows."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, the same on all processes."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        return None
