"""Ends a run in good order when the cluster wants its machine back: on SIGTERM or SIGUSR1 the step under way is
finished, a checkpoint is saved, and `Preempted` is raised on all processes.

Outside of trainings, a recipe ends at once. Knows signals and `Trainer`'s loop; what a checkpoint holds is told
elsewhere.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from transformers import DefaultFlowCallback, Trainer, TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hfkd.distributed import total_over_processes
from hfkd.errors import Preempted

logger = logging.getLogger(__name__)

# A launcher passes on the signal that the scheduler sent to its processes too: that is no second request.
SAME_REQUEST_SECONDS = 5.0


class Preemption:
    """Listens for the signals while it is entered, and knows when all processes have heard of one.

    A second signal, later than `SAME_REQUEST_SECONDS` after the first, does what it would have done without this.
    Outside the main thread, where Python allows no handlers, nothing is listened for.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()
        self._heard = False
        self.saved_at = 0
        """The step of the last checkpoint that this training wrote."""

    def __enter__(self) -> Preemption:
        """Install the handlers."""
        self._received, self._heard, self._process, self.saved_at = None, False, os.getpid(), 0
        if threading.current_thread() is threading.main_thread():
            for number in _ours_to_handle():
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Put the handlers back. A signal that came too late to end the training is sent on: it is not lost."""
        previous, self._previous = self._previous, {}
        for number, handler in previous.items():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, handler)
        if kind is None and self._received is not None:
            signal.raise_signal(self._received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        forked = os.getpid() != self._process  # a child keeps its parent's handlers, and must end when it is told to
        if not forked and self._received is None:
            self._received, self._received_at = number, time.monotonic()
            # In a thread: the handler may have interrupted this very logger.
            words = "Got %s: what is under way, a step or an evaluation, is finished, then a checkpoint is saved."
            threading.Thread(target=logger.warning, args=(words, signal.Signals(number).name), daemon=True).start()
        elif forked or time.monotonic() - self._received_at > SAME_REQUEST_SECONDS:
            signal.signal(number, self._previous.get(number, signal.SIG_DFL))
            signal.raise_signal(number)

    @property
    def asked(self) -> bool:
        """Whether this process got a signal."""
        return self._received is not None

    def hear(self, processes: float) -> None:
        """Take note of how many processes got a signal, as summed over all of them before a step."""
        self._heard = processes > 0

    def agree(self, device: torch.device) -> None:
        """Let all processes know of each other's signals, where no step follows soon that would tell.

        Args:
            device: Of this process.
        """
        self.hear(float(total_over_processes(float(self.asked), device)))

    @property
    def due(self) -> bool:
        """Whether training ends now, or after the step under way: the same on all processes."""
        return self._heard or (self.asked and PartialState().num_processes == 1)

    def end(self, trainer: Trainer, trial: Any) -> None:
        """End the training whose checkpoint was just saved.

        Raises:
            Preempted: Always; names the checkpoint and how to go on.
        """
        PartialState().wait_for_everyone()  # the launcher ends all when the first one leaves
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        trainer.is_in_train = False
        step = trainer.state.global_step
        folder = Path(trainer._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        cause = signal.Signals(self._received).name if self._received is not None else "a signal to another process"
        message = f"Stopped by {cause} after step {step} of {trainer.state.max_steps}; saved {folder}. "
        if trainer.args.save_only_model:
            message += "It holds the model only (save_only_model): start a new run from its weights."
        else:
            message += "Continue with --resume (hfkd train and scripts/distill.py), or with "
            message += "trainer.train(resume_from_checkpoint=True)."
        if PartialState().is_main_process:
            logger.warning(message)
        raise Preempted(message, folder)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Let SIGTERM raise `Preempted` while it is entered, outside of trainings; at once, as nothing is under way that
    would be lost. Elsewhere than in the main thread, or where SIGTERM is ignored, nothing changes.

    Yields:
        A function that has further signals ignored, for what must be written on the way out.
    """
    process, main = os.getpid(), threading.current_thread() is threading.main_thread()
    ours = main and signal.SIGTERM in _ours_to_handle()
    previous = signal.getsignal(signal.SIGTERM)

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a child keeps its parent's handlers
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        calm()
        raise Preempted("Stopped by SIGTERM outside of training. Continue with --resume.", None)

    def calm() -> None:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield calm
    except Preempted as error:
        if error.checkpoint is None:
            logger.warning("%s", error)
        raise
    finally:
        if ours:
            signal.signal(signal.SIGTERM, previous)


def evaluate_what_is_owed(trainer: Trainer, checkpoint: str | None, trial: Any, ignore_keys: Any = None) -> None:
    """Evaluate where a training goes on from a checkpoint that was written when an evaluation was due, but before it:
    a signal left it out, or it belongs to the end of the epoch. Learning rate, best checkpoint and early stopping may
    follow from it.

    Args:
        trainer: It may have made steps since then: then nothing is owed.
        checkpoint: That it went on from; None where it began anew.
        trial: As in `Trainer._evaluate`.
        ignore_keys: The same.
    """
    if checkpoint is None or not _evaluation_is_owed(trainer):
        return
    metrics = trainer._evaluate(trial, ignore_keys)
    trainer._determine_best_metric(metrics=metrics, trial=trial)
    if trainer.state.best_global_step == trainer.state.global_step:
        trainer.state.best_model_checkpoint = checkpoint


def _evaluation_is_owed(trainer: Trainer) -> bool:
    args, state, wanted = trainer.args, trainer.state, TrainerControl()
    if state.global_step != trainer._initial_global_step:
        return False
    for entry in state.log_history:
        if entry.get("step") == state.global_step and any(name.startswith("eval_") for name in entry):
            return False
    flow = DefaultFlowCallback()
    flow.on_step_end(args, state, wanted)
    if wanted.should_training_stop or float(state.epoch or 0).is_integer():
        flow.on_epoch_end(args, state, wanted)
    return wanted.should_evaluate


def _ours_to_handle() -> list[int]:
    """SIGTERM unless it is ignored, or handled outside Python; SIGUSR1 where nobody uses it."""
    numbers = []
    if signal.getsignal(signal.SIGTERM) not in (None, signal.SIG_IGN):
        numbers.append(signal.SIGTERM)
    spare = getattr(signal, "SIGUSR1", None)  # there is none on Windows
    if spare is not None and signal.getsignal(spare) == signal.SIG_DFL:
        numbers.append(spare)
    return numbers
