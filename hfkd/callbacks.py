"""What the trainer's parts are told as a run goes on: the data of each epoch, objective and teacher of each step.

Nothing here computes; it passes on what Trainer says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from hfkd.data.views import DistillationDataset
from hfkd.sharding import Placement
from hfkd.teachers import SeveralTeachers

logger = logging.getLogger(__name__)


class Steps(TrainerCallback):
    """Tells the data of each epoch, and the objective and the teacher of each step.

    Args:
        trainer: A trainer with an `objective` and a `teacher`, which are told.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._told = 0.0

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Callbacks that log figures of their own hear whose they are."""
        self._introduce()

    def _introduce(self) -> None:
        """Give the trainer to the callbacks that wait for one: those with an attribute `trainer` that is None."""
        for callback in self.trainer.callback_handler.callbacks:
            if getattr(callback, "trainer", self) is None:
                callback.trainer = self.trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first weights and temperatures; a schedule that can't be over in time is refused here."""
        self._introduce()  # those that came later, too
        writer = self.trainer.writer
        own_text = writer is not None and bool(writer.mixture.shares.get("student"))
        self.trainer.objective.check_schedules(state.max_steps, own_text)
        self.trainer.objective.set_step(state.global_step, state.max_steps)
        self._log_placements(several=args.world_size > 1)

    def _log_placements(self, several: bool) -> None:
        """What this process really holds of each model, now that the student is wrapped; of whole ones only where
        there are several processes.
        """
        placements = {name: Placement.of(model) for name, model in self._models()}
        if not several and all(placement.kind == "whole" for placement in placements.values()):
            return
        figures: dict[str, float] = {}
        for name, placement in placements.items():
            logger.info("The %s on this process: %s", name, placement)
            figures |= {
                f"placement/{name}_shards": placement.shards,
                f"placement/{name}_megabytes": placement.bytes_here / 1e6,
                f"placement/{name}_megabytes_whole": placement.bytes_whole / 1e6,
            }
        self.trainer.log(figures)

    def _models(self) -> Iterator[tuple[str, nn.Module]]:
        """The student, and what teachers hold besides its weights."""
        yield "student", self.trainer.model
        teacher = self.trainer.teacher
        members = teacher.teachers if isinstance(teacher, SeveralTeachers) else {"": teacher}
        for name, member in members.items():
            if (model := getattr(member, "own_model", None)) is not None:
                yield f"teacher_{name}".removesuffix("_"), model

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the student's demonstrations be drawn anew."""
        if self.trainer.sampler is not None:
            # Trainer tells it too, but not through the two wrappers that several processes and a resume put around it.
            self.trainer.sampler.set_epoch(int(state.epoch or 0))
        dataset = self.trainer.train_dataset
        if isinstance(dataset, DistillationDataset):
            dataset.set_epoch(int(state.epoch or 0))
        epoch = float(state.epoch or 0)
        if self.trainer.teacher is not None and epoch and epoch.is_integer() and epoch != self._told:
            # Once more: a checkpoint of an epoch's last step is written before that epoch ends.
            self.trainer.teacher.after_epoch(epoch)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The teacher may be what the student was until now."""
        self._told = float(state.epoch or 0)
        if self.trainer.teacher is not None:
            self.trainer.teacher.after_epoch(self._told)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A signal needs no second checkpoint of the same step."""
        self.trainer.preemption.saved_at = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The student changed, and the next step has its own weights and temperatures."""
        self.trainer.objective.zero_grad()  # Trainer empties the model's gradients only
        self.trainer.objective.set_step(state.global_step, state.max_steps)
        if self.trainer.teacher is not None:
            self.trainer.teacher.after_step(state.global_step)
        sampler = self.trainer.sampler
        if sampler is not None and (found := sampler.after_step(self.trainer, state.global_step)):
            self.trainer.log(found)
