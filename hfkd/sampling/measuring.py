"""Samplers that look at student and teacher every few steps and draw by what they saw.

What was seen counts from the next step of which no process has drawn an example; a data loader is a batch ahead, more
with workers. So all processes, and a run that is gone on from a checkpoint, draw the same. What is drawn by is known
by subclasses.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Trainer

from hfkd.batch import Batch
from hfkd.distributed import largest_and_smallest, run_inside, total_over_processes
from hfkd.packing import run_view
from hfkd.plan import rows_that_fit
from hfkd.rows import DenseRows, Head, RowLayout, supervised
from hfkd.sampling.base import ExampleSampler
from hfkd.sampling.course import Course
from hfkd.teachers import evaluating

Reading = Callable[[Trainer, Mapping[str, Any]], tuple[NDArray[np.int64], NDArray[np.float32]]]
"""Of a trainer and a micro-batch: of each supervised token [n] the row that it belongs to and a number."""


class MeasuringSampler(ExampleSampler):
    """A sampler that measures every `interval` steps. `measure` and `order` are the methods to write.

    Args:
        interval: Optimizer steps between two measurements, >= 1.

    Attributes:
        course: What was decided, and from where it counts.
        drawn: Examples that this process's iteration of the epoch has given so far; `order` counts them.

    Raises:
        ValueError: The interval isn't such a number.
    """

    needs_teacher = True

    def __init__(self, interval: int) -> None:
        self.interval = whole_number(interval, "interval", "optimizer steps between two measurements")
        self.course, self.drawn = Course(), 0
        self._checked = False

    @abstractmethod
    def measure(self, trainer: Trainer, step: int) -> tuple[Tensor | None, dict[str, float]]:
        """Look at the models; every process is here at once and must return the same.

        Returns:
            The decision [n] that counts from now on, or None where the last one stays; and figures for the log.
        """

    def is_due(self, step: int) -> bool:
        """Whether it is measured after this step."""
        return step % self.interval == 0

    def after_step(self, trainer: Trainer, step: int) -> dict[str, float]:
        """Measure, if it is time."""
        if not self._checked:
            check_can_measure(trainer, type(self).__name__)
            self._checked = True
        if not self.is_due(step):
            return {}
        with trainer.meter.paused():
            decision, figures = self.measure(trainer, step)
        if decision is not None:
            self.course.record(self.epoch, self._undrawn(), decision)
        return figures

    def _undrawn(self) -> int:
        """The first step of the epoch, as a number of examples, of which no process has drawn one."""
        drawn, size = largest_and_smallest(self.drawn)[0], self.examples_per_step
        return math.ceil(drawn / size) * size

    def settings(self) -> dict[str, float]:
        """What decides the draws besides what was measured; the same where a run goes on."""
        return {"interval": self.interval}

    def state_dict(self) -> dict[str, Tensor]:
        """The decisions, and the settings that they were made with."""
        made = {f"settings.{name}": torch.tensor(float(value)) for name, value in self.settings().items()}
        return {**made, **self.course.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: It was made with other settings, so that what was drawn can't be drawn again.
        """
        for name, value in self.settings().items():
            was = state[f"settings.{name}"]
            if was != torch.tensor(float(value)):
                raise ValueError(
                    f"{type(self).__name__}: {name} is {value:g}, and the checkpoint was made with {was.item():g}: "
                    "its place in the data would stand for other rows. Go on with the old value, or start a new run "
                    "from the weights."
                )
        self.course.load_state_dict(state)


def check_can_measure(trainer: Trainer, name: str) -> None:
    """Refuse a training in which there is nothing to measure.

    Raises:
        ValueError: There is no teacher, or the data set's answers are never learned, so that they may be none.
    """
    if trainer.teacher is None:
        raise ValueError(f"{name} asks the teacher, and there is none. Pass `teacher=`, or leave the sampler out.")
    if trainer.writer is not None and not trainer.writer.mixture.shares.get("dataset"):
        raise ValueError(
            f"{name} measures on the answers of the data set, and all answers are written during training. Give "
            "answer a share of `dataset`, let the teacher write before training, or leave the sampler out."
        )


def mean_by_group(
    trainer: Trainer, examples: Sequence[int], groups: Sequence[int], reading: Reading
) -> NDArray[np.float64]:
    """Read examples, each on one of the processes, and average over the tokens of each group.

    Every process makes as many forwards: one that is through reads its last micro-batch once more, uncounted.

    Args:
        trainer: A `DistillationTrainer`.
        examples: Numbers of examples of its data set.
        groups: The group of each, counted from 0.
        reading: What is averaged.

    Returns:
        [groups], the same on all processes; not a number where a group has no supervised token.
    """
    dataset, size, processes = trainer.train_dataset, trainer.args.eval_batch_size, trainer.accelerator.num_processes
    starts = range(0, len(examples), size)
    sums = np.zeros((2, max(groups) + 1))
    for first in range(0, len(starts), processes):
        place = first + trainer.accelerator.process_index
        start = starts[min(place, len(starts) - 1)]
        inputs = trainer.data_collator([dataset[index] for index in examples[start : start + size]])
        rows, values = reading(trainer, inputs)
        if place < len(starts):
            group = np.asarray(groups)[start + rows]
            np.add.at(sums[0], group, values)
            np.add.at(sums[1], group, 1.0)
    total, tokens = total_over_processes(sums.tolist(), trainer.args.device).cpu().numpy()
    return np.divide(total, tokens, out=np.full_like(total, np.nan), where=tokens > 0)


def student_log_probs(trainer: Trainer, inputs: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What the student alone gives each supervised token of a micro-batch, without a gradient and without dropout.

    Returns:
        The row [n] of each token within the micro-batch, and its log-probability [n] (nats).
    """
    batch = Batch.from_inputs(trainer._prepare_inputs(dict(inputs)))
    wrapped = trainer.model_wrapped
    module, found = trainer.accelerator.unwrap_model(wrapped), []
    with torch.no_grad(), evaluating(module), trainer.accelerator.autocast():
        run_inside(wrapped, module, lambda *_: _inside(trainer, module, batch, found), batch.student.input_ids)
    rows = RowLayout.of(batch.student.labels).sequence
    return rows.cpu().numpy(), found[0].cpu().numpy()


def _inside(trainer: Trainer, module: nn.Module, batch: Batch, found: list[Tensor]) -> Tensor:
    hidden, labels = run_view(module, batch.student, trainer.args.padding_free)
    rows, targets = DenseRows(supervised(hidden, labels), Head.of(module)).detached(), batch.student.targets
    size = trainer.objective.chunk_size or rows_that_fit(rows.vocab_size, targets.device)
    wide = torch.promote_types(rows.hidden.dtype, torch.float32)
    buffer = rows.hidden.new_empty(min(size, len(rows)), rows.vocab_size, dtype=wide)
    parts = [buffer.new_zeros(0)]
    for start in range(0, len(rows), size):
        logits = rows.logits(slice(start, start + size), buffer)
        chosen = logits.gather(-1, targets[start : start + size, None])[:, 0]
        parts.append(chosen - logits.logsumexp(dim=-1))
    found.append(torch.cat(parts))
    return torch.zeros((), device=hidden.device)


def whole_number(value: int, name: str, meaning: str) -> int:
    """The value, if it is a whole number of at least 1.

    Raises:
        ValueError: It isn't.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a number of {meaning}, at least 1.")
    return value
