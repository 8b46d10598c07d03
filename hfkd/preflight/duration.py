"""How long a run will take: a few real steps are made and timed, on weights that nobody keeps, and the rest is
multiplied.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from hfkd.preflight.distillable import Asked
from hfkd.preflight.findings import Finding
from hfkd.run.build import Run
from hfkd.trainer import DistillationTrainer

NAME = "duration"
TRIED = 4
"""Micro-steps that are made; the first one warms up and isn't counted."""


def planned_steps(run: Run, examples: int, processes: int = 1) -> int:
    """Optimizer steps of the whole run.

    Args:
        run: Its config says how far it goes.
        examples: In the training set.
        processes: Among which each step is divided.
    """
    config = run.config
    if config.max_steps > 0:
        return config.max_steps
    batches = math.ceil(examples / (config.train_batch_size * processes))
    return math.ceil(config.num_train_epochs * max(1, math.ceil(batches / config.gradient_accumulation_steps)))


def time_steps(trainer: DistillationTrainer) -> list[float]:
    """Train for a few steps; the weights change.

    Args:
        trainer: Whose steps are single micro-batches, and whose output folder may be thrown away.

    Returns:
        Seconds of each step after the first; of the first one where there is no other.
    """
    clock = _Clock(trainer.args.device)
    trainer.add_callback(clock)
    trainer.train()
    gaps = [after - before for before, after in zip(clock.marks, clock.marks[1:], strict=False)]
    return gaps[1:] or gaps


class _Clock(TrainerCallback):
    """Notes when each step ended, and ends the training after a few."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock starts."""
        self._mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step more."""
        self._mark()
        if len(self.marks) > TRIED:
            control.should_training_stop = True

    def _mark(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.marks.append(time.perf_counter())


def estimate_duration(
    run: Run,
    examples: int,
    seconds: list[float],
    asked: Mapping[str, Asked | None],
    answer_seconds: float | None,
    processes: int = 1,
) -> Iterator[Finding]:
    """Multiply what was measured.

    Args:
        run: Says how much of it there is.
        examples: In the training set.
        seconds: Of single micro-steps.
        asked: What `student` and `teacher` answered to the items, which tells how long a question takes; None where
            one wasn't asked.
        answer_seconds: That the teacher took for one answer that is learned; None where it writes none before.
        processes: Of the run.
    """
    steps = planned_steps(run, examples, processes)
    micro, each = run.config.gradient_accumulation_steps, median(seconds)
    training = steps * micro * each
    parts = {"training": training}
    questions = {"evaluation": _questions(run), "teacher's evaluation": _teachers_questions(run)}
    for name, answered in zip(questions, (asked["student"], asked["teacher"]), strict=True):
        if answered is not None and questions[name]:
            parts[name] = questions[name] * answered.seconds / len(answered.right)
    if answer_seconds is not None:
        visited = min(examples, steps * micro * run.config.train_batch_size * processes)
        parts["teacher's answers"] = visited * answer_seconds / processes
    if run.recipe.evaluation is not None and run.recipe.evaluation.gold_baseline:
        parts["gold baseline, at most"] = training
    total = sum(parts.values())
    figures = {"steps": steps, "micro_steps": micro, "seconds_each": seconds, "processes": processes}
    figures |= {"seconds": total, "parts": parts, "questions": questions["evaluation"]}
    figures["teacher_questions"] = questions["teacher's evaluation"]
    several = f", and each of {processes} processes taken to be as fast" if processes > 1 else ""
    words = ", ".join(f"{name} {in_words(part)}" for name, part in parts.items())
    how = (
        f"{steps} steps of {micro} micro-batch{'' if micro == 1 else 'es'} of {run.config.train_batch_size} examples "
        f"at {each:.2g} s, the median of {len(seconds)} that were made here after one to warm up{several}"
    )
    for name, count in questions.items():
        if name in parts:
            whose = "" if name == "evaluation" else " of the teacher"
            how += f"; {count} questions{whose} at {parts[name] / count:.2g} s"
    left_out = f"{_longer_prompts(run)} Fidelity, evaluations in training, saving and loading aren't counted."
    yield Finding("pass", NAME, f"About {in_words(total)}: {words}. Measured: {how}.{left_out}", figures)


def _questions(run: Run) -> int:
    """How often the student is asked in the whole run."""
    section = run.recipe.evaluation
    if section is None or run.evaluation is None:
        return 0
    tasks = [run.evaluation, *run.forgetting]
    once = sum(len(task.items) * len(task.shots) for task in tasks)
    return once * (3 if section.gold_baseline else 2)


def _teachers_questions(run: Run) -> int:
    """How many questions another model that teaches is asked, once and before training."""
    section, teacher = run.recipe.evaluation, run.recipe.teacher
    asked = section is not None and run.evaluation is not None and section.shots
    return len(run.evaluation.items) if asked and teacher.kind == "local" and teacher.cache is None else 0


def _longer_prompts(run: Run) -> str:
    """Said where the run asks with more demonstrations than the student was timed with."""
    shots = max(run.recipe.evaluation.shots, default=0) if run.recipe.evaluation is not None else 0
    timed = max(run.recipe.data.student_shots)
    if shots <= timed:
        return ""
    shown = f"{timed} demonstration{'' if timed == 1 else 's'}"
    return f" The student was timed with at most {shown} in its prompt; with {shots} it takes longer."


def in_words(seconds: float) -> str:
    """Seconds, minutes or hours, whichever a person would say."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
