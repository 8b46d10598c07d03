"""Which example comes next: what a sampler of one's own is, and how it stays the same on all processes and after a
resume.

A sampler is a function of its seed, of the place in the run and of what it measured; what it measured is kept with the
place from which it counts, so that a resumed run draws what the first one drew. Knows numbers of examples, no texts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Sampler

from hfkd.data.views import DistillationDataset


class ExampleSampler(Sampler[int]):
    """Draws the examples of a training, in place of Trainer's random order. `order` is the method to write.

    A trainer calls `attach` once, iterates once an epoch (`set_epoch` comes before), and calls `after_step` on every
    process after each optimizer step, before a checkpoint is written.

    Attributes:
        dataset: The examples, once attached.
        seed: Of the run, once attached.
        examples_per_step: Those of one optimizer step on all processes, once attached.
        epoch: Of the next iteration.
        needs_teacher: Whether a recipe without a teacher is refused.
    """

    needs_teacher: bool = False

    dataset: DistillationDataset
    seed: int = 0
    examples_per_step: int = 1
    epoch: int = 0

    def attach(self, dataset: DistillationDataset, *, seed: int, examples_per_step: int) -> None:
        """Hear what is drawn from. Override it to look at the rows (`dataset.row(index)`), and call this one.

        Raises:
            ValueError: The rows don't have what is drawn by.
        """
        self.dataset, self.seed, self.examples_per_step = dataset, seed, examples_per_step

    def set_epoch(self, epoch: int) -> None:
        """Which epoch is iterated next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        """The numbers of an epoch's examples, as many as there are examples."""
        return self.order(self.epoch)

    @abstractmethod
    def order(self, epoch: int) -> Iterator[int]:
        """Yield `len(self)` numbers of examples, the same on all processes; one may come several times or never."""

    def after_step(self, trainer: Any, step: int) -> dict[str, float]:
        """Measure, if it is time; every process is here at once.

        Args:
            trainer: The `DistillationTrainer` (see `hfkd.reading.read_batch`).
            step: Optimizer steps made.

        Returns:
            Figures for the log, by name; none where nothing was measured.
        """
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, the same on all processes."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave; comes after `attach` and before the first iteration."""
        return None
