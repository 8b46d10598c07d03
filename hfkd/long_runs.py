"""`LongRunTrainer`: what a `Trainer` needs so that a run of days can be interrupted anywhere and lose little.

It decides when a checkpoint is written, checked and gone on from; how is `hfkd.checkpoint`. It knows no loss.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from transformers.trainer import TRAINING_ARGS_NAME

from hfkd.checkpoint import (
    Finding,
    check_same_training,
    clear_unfinished,
    has_optimizer,
    inspect,
    load_companions,
    of_last_course,
    publish,
    rotate,
    save_companions,
)
from hfkd.data.views import DistillationDataset
from hfkd.errors import CheckpointError, CheckpointNotSaved
from hfkd.faults import StepWatch, clipped, not_saved
from hfkd.masking import shareable_text
from hfkd.preemption import Preemption, evaluate_what_is_owed
from hfkd.publishing import PublishingTrainer
from hfkd.record import UNFINISHED, check_writable, checkpoints, rows_fingerprint
from hfkd.rollout.on_policy import Writer
from hfkd.sharding import own_names
from hfkd.teachers import Teacher
from hfkd.writing import deciders

logger = logging.getLogger(__name__)

_SAMPLED_ROWS = 256


class LongRunTrainer(PublishingTrainer):
    """A `Trainer` whose checkpoints are whole or not there, and whose run goes on exactly where it was.

    A subclass sets `objective`, `teacher` and `writer`, whose states are kept beside the student's.

    Raises:
        OSError: `save_strategy` isn't "no", and the output folder can't be written into.
    """

    objective: nn.Module
    teacher: Teacher | None
    writer: Writer | None

    _drafts: Path | None = None
    """While a checkpoint is written: the folder that stands for the run's."""
    _gone_on_from: str | None = None
    _course = ""
    """One name for a run and what goes on from it, by which its checkpoints are told from those of another."""
    _apart = False
    """Whether what this process writes is where the first one doesn't see it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = kwargs["args"]
        if settings.should_save and settings.save_strategy != "no":
            check_writable(settings.output_dir)
        super().__init__(*args, **kwargs)
        self.preemption, self.watch = Preemption(), StepWatch()

    # --- going on

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; a checkpoint is checked before anything of it is read.

        Args:
            resume_from_checkpoint: True for the newest checkpoint of the output folder that is whole; a folder with
                checkpoints for the newest one in it; or one checkpoint. One of the last step is loaded, and no more
                steps are made.
            args: As in `Trainer`.
            kwargs: As in `Trainer`.

        Raises:
            CheckpointError: There is none to go on from, or it is of another training.
            Preempted: A signal asked for the end; the step under way was finished and a checkpoint saved.
            NonFiniteLoss: Before the weights were changed; the batches of the step are saved.
            NonFiniteGradient: The same.
        """
        self._course = gather_object([uuid.uuid4().hex])[0]
        self._look_at_disks()
        if (self.args.should_save or self._apart) and (done := clear_unfinished(Path(self.args.output_dir))):
            logger.warning("A run that was interrupted left unfinished: %s", ", ".join(done))
        self.accelerator.wait_for_everyone()
        chosen = str(self._chosen(resume_from_checkpoint)) if resume_from_checkpoint else None
        self._gone_on_from = chosen
        with self.preemption:
            return super().train(chosen, *args, **kwargs)

    def _look_at_disks(self) -> None:
        """Find out whether all machines write into one folder, and say what it means where they don't."""
        if self.args.save_on_each_node or sum(gather_object([self.args.local_process_index == 0])) == 1:
            return
        mark = Path(self.args.output_dir) / UNFINISHED / f"seen-{self._course}"
        if self.args.process_index == 0:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        self.accelerator.wait_for_everyone()
        seen = gather_object([mark.exists()])
        if self.args.process_index == 0:
            mark.unlink()
        self._apart = not seen[self.args.process_index]
        if apart := [place for place, it in enumerate(seen) if not it]:
            self._warn(
                f"{self.args.output_dir} isn't one folder for all machines: process 0 doesn't see what processes "
                f"{apart} write into it, so checkpoints lack it and can't be gone on from. Choose a "
                "training.output_dir on a disk that all machines share, or set save_on_each_node=True."
            )

    def _init_training_state(self, max_steps: int, per_epoch: int, epochs: int, *args: Any) -> tuple[int, int]:
        """As in `Trainer`, which only looks whether it is done after one more step."""
        found = super()._init_training_state(max_steps, per_epoch, epochs, *args)
        return (epochs, 0) if self.state.global_step >= max_steps else found

    def _chosen(self, wanted: str | bool) -> Path:
        """The checkpoint to go on from, the same one on every process."""
        folder = Path(self.args.output_dir if wanted is True else wanted)
        names = gather_object([[path.name for path in of_last_course(folder)]])[0]  # of the first process
        if wanted is not True and not names:
            finding = self._inspected(folder)
            if finding.kind == "damaged":
                others = [path for path in checkpoints(folder.parent) if path.resolve() != folder.resolve()]
                raise CheckpointError(
                    f"{folder} can't be gone on from: {finding.reason}. Take another one"
                    + (f" ({', '.join(path.name for path in others)} beside it)" if others else "")
                    + ", or resume_from_checkpoint=True for the newest one that is whole."
                )
            return self._accepted(folder, finding)
        for name in reversed(names):
            finding = self._inspected(folder / name)
            if finding.kind != "damaged":
                return self._accepted(folder / name, finding)
            self._warn(f"{folder / name} is damaged: {finding.reason}. Going back to the checkpoint before it.")
        raise CheckpointError(
            f"No checkpoint in {folder} can be gone on from: "
            + (f"{', '.join(names)} are damaged" if names else "there is none")
            + ". Start anew (without resume_from_checkpoint, or with --overwrite), or give another folder."
        )

    def _inspected(self, checkpoint: Path) -> Finding:
        """What is wrong with it anywhere: each machine looks at its own disk."""
        here = inspect(checkpoint) if self.args.local_process_index == 0 else None
        findings = [(place, one) for place, one in enumerate(gather_object([here])) if one is not None]
        order = ("damaged", "newer", "unverified", "whole")
        place, finding = min(findings, key=lambda one: order.index(one[1].kind))
        where = f" (on the machine of process {place})" if len(findings) > 1 else ""
        return replace(finding, reason=finding.reason + where)

    def _accepted(self, checkpoint: Path, finding: Finding) -> Path:
        if finding.kind == "newer":
            raise CheckpointError(f"{checkpoint} can't be read: {finding.reason}. Update hfkd, or start anew.")
        if not gather_object([has_optimizer(checkpoint)])[0]:
            raise CheckpointError(
                f"{checkpoint} holds the model only (save_only_model): going on from it would begin with a new "
                "optimizer and another learning rate. Give one that holds all, or start a new run from its weights."
            )
        if finding.kind == "unverified":
            self._warn(f"{checkpoint} can't be verified: {finding.reason}. It is taken as it is.")
            return checkpoint
        made, now = finding.manifest, self._about()
        if (before := made.get("deciders", now["deciders"])) != now["deciders"]:
            raise CheckpointError(
                f"{checkpoint} was made with other samplers or revisers ({', '.join(before) or 'none'}; now "
                f"{', '.join(now['deciders']) or 'none'}). Go on with those, or start a new run from the weights."
            )
        if self.args.ignore_data_skip:
            made = {**made, "data": now["data"]}
        if note := check_same_training(checkpoint, made, now):
            self._warn(note)
        if not now["data"]:
            self._warn(
                "The training data have no length, so how often they were gone through isn't known. The rows that "
                "were learned are skipped from their beginning: exact in their first pass only."
            )
        self._course = made.get("course", self._course)
        return checkpoint

    def _about(self) -> dict[str, Any]:
        """What a manifest says of the training that made it."""
        sharding = "fsdp" if self.is_fsdp_enabled else "deepspeed" if self.is_deepspeed_enabled else "none"
        about = {
            "course": self._course,
            "step": self.state.global_step,
            "processes": self.args.world_size,
            "batch": self.args.train_batch_size,
            "accumulation": self.args.gradient_accumulation_steps,
            "sharding": sharding,
            "data": data_fingerprint(self.train_dataset),
            "objective": self.objective.describe(),
            "teacher": None if self.teacher is None else _identity(self.teacher.describe()),
            "deciders": list(deciders(self)),
        }
        return json.loads(json.dumps(about, default=lambda one: type(one).__name__))  # no addresses

    def _warn(self, text: str) -> None:
        if self.args.process_index == 0:
            logger.warning(text)

    # --- writing

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `Trainer`, in a folder beside the checkpoints; moved to its place when all of it is on the disk.

        Raises:
            CheckpointNotSaved: It couldn't be written. What was written of it is removed; those before it stay.
        """
        folder = Path(self._get_output_dir(trial=trial))
        final = folder / f"checkpoint-{self.state.global_step}"
        self._drafts = folder / UNFINISHED
        draft = self._drafts / final.name
        try:
            super()._save_checkpoint(model, trial)
            self._name_best(folder, draft)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(draft, final, self._about())
            self.accelerator.wait_for_everyone()
            if self._apart:
                shutil.rmtree(self._drafts, ignore_errors=True)
        except Exception as error:
            shutil.rmtree(self._drafts, ignore_errors=True)
            raise CheckpointNotSaved(not_saved(final, error)) from error
        finally:
            self._drafts = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate(folder, self.args.save_total_limit, final, self.state.best_model_checkpoint)

    def _name_best(self, folder: Path, draft: Path) -> None:
        """Trainer looks for the best checkpoint where it writes; its place is the one that it will be moved to."""
        if not self.state.best_global_step:
            return
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if best.exists() or best.name == draft.name:
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(draft / "trainer_state.json"))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._drafts) if self._drafts is not None else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not before it is in its place."""
        if self._drafts is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; and whole where checkpoints hold shards, of which Trainer makes no model."""
        super().save_model(output_dir, _internal_call)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and "SHARDED_STATE_DICT" in str(plugin.state_dict_type) and not _internal_call:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As in `Trainer`, without a pickle of the settings, which nothing reads, and without this machine's paths in
        the page that peft writes.
        """
        with own_names(self.model):
            super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return  # the process that wrote them looks after them
        folder = Path(output_dir or self.args.output_dir)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if (page := folder / "README.md").is_file():
            page.write_text(shareable_text(page.read_text("utf-8")), "utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Beside the optimizer, in checkpoints only: what the losses learned is no part of the student."""
        super()._save_optimizer_and_scheduler(output_dir)
        parts = (self.objective, self.teacher, self.writer)
        save_companions(output_dir, *parts, first=self.args.should_save, beside=deciders(self))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in `Trainer`, and what was saved beside them. DeepSpeed loads its model in a way of its own, so the
        loading of the model is no place for it.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_companions(checkpoint, self.objective, self.teacher, self.writer, beside=deciders(self))

    # --- ending early

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """As in `Trainer`; where the machine is wanted back, a checkpoint comes before everything else, and the end
        after it.
        """
        if self.control.should_training_stop:
            self.preemption.agree(self.args.device)  # no step follows at whose beginning they would
        if ends := self.preemption.due:
            saves = self.preemption.saved_at != self.state.global_step
            self.control.should_log, self.control.should_evaluate, self.control.should_save = True, False, saves
        evaluates = self.control.should_evaluate
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if ends:
            self.preemption.end(self, trial)
        if evaluates:  # which may have taken long
            self.preemption.agree(self.args.device)
            if self.preemption.due:
                self._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`; the evaluation that was due when the checkpoint was written comes first."""
        evaluate_what_is_owed(self, self._gone_on_from, kwargs.get("trial"), kwargs.get("ignore_keys_for_eval"))
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; the same, where no epoch is left."""
        evaluate_what_is_owed(self, self._gone_on_from, trial)
        return super()._finalize_training(trial, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = clipped(self, model, self.watch, self.args.max_grad_norm)
        return super()._clip_grad_norm(model) if norm is None else norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As in `Trainer`, just before the optimizer's step: the last chance to keep a NaN out of the weights."""
        if grad_norm is None:
            grad_norm = clipped(self, model, self.watch, None)
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.watch.check(self, model, grad_norm)
        return grad_norm

    # --- the same random numbers, whatever happens between two steps

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`; the random numbers of the training go on as if it hadn't been."""
        with keeping_random_state(self.args.device):
            return super().evaluate(*args, **kwargs)


@contextmanager
def keeping_random_state(device: torch.device) -> Iterator[None]:
    """Put all generators back as they were: Python's, NumPy's and PyTorch's, of the CPU and of the device.

    A run that is resumed after an evaluation doesn't repeat it, and a data loader draws a seed even where it needs
    none.

    Args:
        device: Of this process.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def data_fingerprint(dataset: Any) -> dict[str, Any]:
    """How many examples there are, and a hash of some of their rows and of the demonstrations.

    Args:
        dataset: Of views, or any other: then only its length counts, since what it gives may differ at each visit.
    """
    if not hasattr(dataset, "__len__"):
        return {}
    fingerprint: dict[str, Any] = {"examples": len(dataset)}
    if isinstance(dataset, DistillationDataset):
        every = max(1, len(dataset) // _SAMPLED_ROWS)
        rows = [dataset.row(place) for place in range(0, len(dataset), every)]
        fingerprint["sha256"] = rows_fingerprint([*rows, *dataset.demonstrations])["sha256"]
    return fingerprint


def _identity(told: Any) -> Any:
    """What a teacher says of itself without where it lies and how it is run, which may change."""
    if not isinstance(told, dict):
        return told
    beside = ("model", "revision", "dtype", "tokenizer", "cache", "bytes_per_token", "reuse_prefix")
    return {name: _identity(value) for name, value in told.items() if name not in beside}
