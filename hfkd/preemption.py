"""Ends a run in good order when the cluster wants its machine back: on SIGTERM or SIGUSR1 the step under way is
finished, a checkpoint is saved, and `Preempted` is raised on all processes.

Knows signals and `Trainer`'s loop; what a checkpoint holds is told elsewhere.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate import PartialState
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

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

    def __enter__(self) -> Preemption:
        """Install the handlers."""
        self._received, self._heard, self._process = None, False, os.getpid()
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

    @property
    def due(self) -> bool:
        """Whether training ends after this step: the same on all processes."""
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
        message = (
            f"Stopped by {cause} after step {step} of {trainer.state.max_steps}; saved {folder}. Continue with "
            "--resume (hfkd train and scripts/distill.py), or with trainer.train(resume_from_checkpoint=True)."
        )
        if trainer.args.save_only_model:
            message += " save_only_model is on, so what continues begins with these weights at step 0."
        if PartialState().is_main_process:
            logger.warning(message)
        raise Preempted(message, folder)


def _ours_to_handle() -> list[int]:
    """SIGTERM unless it is ignored, or handled outside Python; SIGUSR1 where nobody uses it."""
    numbers = []
    if signal.getsignal(signal.SIGTERM) not in (None, signal.SIG_IGN):
        numbers.append(signal.SIGTERM)
    spare = getattr(signal, "SIGUSR1", None)  # there is none on Windows
    if spare is not None and signal.getsignal(spare) == signal.SIG_DFL:
        numbers.append(spare)
    return numbers
