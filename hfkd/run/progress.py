"""A progress bar for training: the step, the time left and the last loss, in the place of a log line per step.

It shows; it decides nothing, and every figure is in the trainer's log as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


class _Bar(TrainerCallback):
    def __init__(self, progress: Progress, description: str) -> None:
        self.progress = progress
        self.task = progress.add_task(description, total=None, loss="")
        self.loss = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Know how long it is."""
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step on."""
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the last loss."""
        if logs and "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.3f}"
            self.progress.update(self.task, loss=self.loss)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A bar that stands still has a reason."""
        self.progress.update(self.task, loss="evaluating")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Print what an evaluation found above the bar, where it stays."""
        self.progress.update(self.task, loss=self.loss)
        if line := _evaluation_line(metrics or {}):
            self.progress.console.print(f"Step {state.global_step}: {line}", markup=False, highlight=False)


def _evaluation_line(metrics: Mapping[str, float]) -> str:
    """The loss on held-out texts and the k-shot accuracies, where they were measured."""
    parts = [f"loss {metrics['eval_loss']:.3f} on held-out texts"] if "eval_loss" in metrics else []
    for name, accuracy in metrics.items():
        if (found := re.fullmatch(r"eval_k_shot_(\d+)", name)) is not None:
            error = metrics[f"{name}_standard_error"]
            parts.append(f"{found[1]}-shot {100 * accuracy:.1f}% ± {100 * error:.1f}%")
    return ", ".join(parts)


@contextmanager
def training_bar(trainer: Trainer, console: Console, description: str) -> Iterator[None]:
    """Show a bar while the trainer trains.

    Args:
        trainer: Its own bar and its log lines are taken off.
        console: A quiet one shows nothing.
        description: What stands before the bar.
    """
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(
        *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console
    ) as progress:
        bar = _Bar(progress, description)
        trainer.add_callback(bar)
        try:
            yield
        finally:
            trainer.remove_callback(bar)
