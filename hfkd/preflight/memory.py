"""How much memory a run will take at its peak, by part, before anything of it is loaded or trained.

The step is rehearsed without numbers (`hfkd.preflight.rehearsal`): the student's own layers, attention, adapter and
checkpointing, the teacher, the terms of the loss and the optimizer, on the longest texts of the run; and what is
written and read without learning. On one process a step is exact to the tensor; the tests hold it to 15 % of what a
process really takes. Not seen is what lies outside tensors: kernels' work space, what an allocator keeps back and cuts
up (leave a tenth of a CPU's memory and a fifth of a GPU's), libraries, and vLLM, which takes a share of its own; nor
loading and saving. A gold baseline takes less than the run, whose models are gone by then.

An estimate, and no more, are

- shards: weights, gradients and state are divided by the number of processes, and `hfkd.memory.gathered` says what is
  whole for a moment; what communication takes is known for DDP alone (its buckets, as large as the gradients);
- generation (k-shot of student and teacher, answers to learn from): all rows at their longest, in one pass, without a
  prefix run once;
- evaluation (fidelity, and evaluations in training): one batch of the longest held-out texts, read by both models and
  taken through the terms of the loss (fidelity's own figures take a buffer of a chunk or two more);
- answers that are still to be written: as long as they may be;
- a loss that looks at numbers: run for real on a few rows, and taken to grow with rows and vocabulary;
- a model that looks at numbers (some mixtures of experts): `hfkd.memory`'s arithmetic then, for everything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import str_to_bool
from torch import nn
from transformers.trainer_utils import IntervalStrategy

from hfkd.batch import Batch
from hfkd.memory import ModelSize, Setup, Sharding, gathered, memory, shares
from hfkd.objective import Objective, build_objective
from hfkd.plan import free_bytes, rows_that_fit
from hfkd.preflight.bare import CannotEstimate, bare_student, bare_teacher, local_members
from hfkd.preflight.largest import Largest, held_out_batch, largest_batch, longest_prompt
from hfkd.preflight.rehearsal import PARTS, TEACHER_WEIGHTS, Reading, Scene, Writing, measured_reader, rehearse
from hfkd.rows import base_model_of, head_size
from hfkd.run.build import Run
from hfkd.signal import DISTRIBUTION
from hfkd.states import state_width
from hfkd.teachers import CachedTeacher, SelfTeacher, Teacher

__all__ = ["CannotEstimate", "Estimate", "Part", "available_bytes", "chunk_size_that_fits", "estimate"]

_SMALLEST = 16
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Part:
    """What one purpose takes.

    Args:
        name: One of `weights`, `gradients`, `optimizer`, `activations`, `objective`, `teacher`, `prefix cache`,
            `generation`, `evaluation`, `gathered` and `communication`.
        bytes: At the moment when all parts together are most.
        most: At any moment.
    """

    name: str
    bytes: int
    most: int


@dataclass(frozen=True)
class Estimate:
    """What one process of a run takes on its device.

    Args:
        parts: By purpose; those of which nothing is ever held are left out.
        device: Where.
        processes: Of the whole run.
        chunk_size: Rows that are projected at once: the recipe's, or what would be chosen now.
        rehearsed: Whether the step was rehearsed; if not it is arithmetic alone.
        notes: What makes it less than exact, in sentences.
        figures: The sizes that it is made of: rows and lengths of the micro-batch.
    """

    parts: tuple[Part, ...]
    device: str
    processes: int
    chunk_size: int
    rehearsed: bool = True
    notes: tuple[str, ...] = ()
    figures: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(part.bytes for part in self.parts)

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Its fields and the total, as plain data."""
        return {**asdict(self), "total": self.total}


def estimate(run: Run, *, processes: int | None = None) -> Estimate:
    """Say what one process of a run takes at its peak.

    Nothing is trained, and no weights are read: of what the run hasn't loaded only configurations are. Takes seconds,
    and the memory of the ids and masks of one micro-batch.

    Args:
        run: From `hfkd.run.build.settings_of` or `build`. With its rows and its prompt builder the lengths are real
            ones, without them the limits of the recipe.
            Its config says whether it evaluates while it trains.
        processes: Of the whole run; None takes as many as there are.

    Raises:
        CannotEstimate: Weights are quantised, or the teacher is a class of the user's own.
        OSError: A configuration or a cache can't be found.
        ValueError: The rows can't be examples.
    """
    return _Plan(run, processes).reckon()


def chunk_size_that_fits(run: Run, available: int | None = None, *, processes: int | None = None) -> int | None:
    """Find the largest `loss.chunk_size` with which a run fits, a power of two.

    Args:
        run: See `estimate`.
        available: Bytes that there are for one process; None takes what the run's device has now.
        processes: See `estimate`.

    Returns:
        At least 16 rows, and no more than the largest micro-batch needs; None where not even 16 fit.

    Raises:
        CannotEstimate: See `estimate`, as for the rest.
    """
    plan = _Plan(run, processes)
    if available is None:
        available = available_bytes(plan.device, plan.processes)
    rows = max(batch.student.tokens for batch in (plan.largest.batch, plan.held_out) if batch is not None)
    sizes = [_SMALLEST * 2**power for power in range(max(1, (max(1, rows) - 1).bit_length() - 3))]
    if plan.reckon(sizes[-1]).total <= available:
        return sizes[-1]
    fits, too_many = -1, len(sizes) - 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if plan.reckon(sizes[middle]).total <= available else (fits, middle)
    return sizes[fits] if fits >= 0 else None


def available_bytes(device: torch.device | str, processes: int = 1) -> int:
    """Memory that a process could take now.

    Args:
        device: A GPU's is what its driver calls free and what this process keeps in reserve; the CPU's is what the
            system, and the group that it put this process in, have left.
        processes: That share a CPU's memory; those of a GPU run have one each.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return free_bytes(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min([free_bytes(device), *_left_to_group()]) // max(1, processes)


def _left_to_group() -> Iterator[int]:
    """What a control group (a container) may take yet, where there is a limit; cached files give way."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        yield limit - int((_CGROUP / "memory.current").read_text()) + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return  # no such group, or no limit: `max` is no number


class _Plan:
    """A run under estimation: its bare models and its largest micro-batch, made once."""

    def __init__(self, run: Run, processes: int | None) -> None:
        self.run, self.config = run, run.config
        self.processes = processes or max(1, run.config.world_size)
        self.device = torch.device(run.config.device)
        self.notes: list[str] = []

    @cached_property
    def student(self) -> nn.Module:
        return bare_student(self.run)

    @cached_property
    def teacher(self) -> Teacher | None:
        teacher = bare_teacher(self.run)
        if isinstance(teacher, CachedTeacher):
            teacher.prepare(self.config, self.student)
        return teacher

    @cached_property
    def largest(self) -> Largest:
        found = largest_batch(self.run, self.teacher, self.device)
        if not found.measured:
            self.notes.append("The rows weren't at hand: all texts are taken to be as long as the recipe allows.")
        return found

    @cached_property
    def setup(self) -> Setup:
        """How the run is laid out, for what is arithmetic."""
        student, batch = self.student, self.largest.batch
        learned = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
        size = ModelSize.of(student)
        voices = local_members(self.teacher)
        return Setup(
            processes=self.processes,
            sharding=_sharding(self.config, self.processes),
            student_dtype=_dtype(student),
            teacher_dtype=_dtype(voices[0].model) if voices else _dtype(student),
            learning=min(1.0, learned / size.parameters),
            tokens=batch.student.input_ids.numel(),
            checkpointing=bool(self.config.gradient_checkpointing),
            teacher=self._place(),
        )

    def _place(self) -> Any:
        section = self.run.recipe.teacher
        if self.teacher is None or isinstance(self.teacher, CachedTeacher):
            return "cached"
        if isinstance(self.teacher, SelfTeacher) and self.teacher.kind == "adapter_off":
            return "adapter_off"
        streamed = section.offload or any(member.offload for member in section.members.values())
        return "offloaded" if streamed and self.device.type != "cpu" else "like_student"

    @cached_property
    def gathered(self) -> float:
        """What is whole for a moment of models in shards or streamed."""
        sizes = [ModelSize.of(member.model) for member in local_members(self.teacher)]
        teacher = max(sizes, key=lambda size: size.layer, default=None)
        return gathered(ModelSize.of(self.student), teacher, self.setup)

    @cached_property
    def scene(self) -> Scene:
        share, setup = shares(self.setup), self.setup
        theirs = share.pop("teacher")
        return Scene(
            self.student,
            self.teacher,
            self.run.objective,
            self.largest,
            self.config,
            self.device,
            {**share, TEACHER_WEIGHTS: 0.0 if setup.teacher == "offloaded" else theirs},
            buckets=setup.processes > 1 and setup.sharding == "none",
            writings=tuple(self._writings()),
            reading=self.held_out and Reading(self.held_out, self._reads),
        )

    @cached_property
    def held_out(self) -> Batch | None:
        """The longest held-out texts, where the run reads any."""
        if self._reads is None:
            return None
        teacher = self.teacher if self._reads.needs else None
        return held_out_batch(self.run, teacher, self._reads, self.device)

    @cached_property
    def _reads(self) -> Objective | None:
        """What rows of held-out texts go through; None where none are read."""
        own, evaluation, teacher = self.run.objective, self.run.recipe.evaluation, self.teacher
        known = isinstance(teacher, CachedTeacher)  # by the texts in its cache, which these aren't
        told = teacher is not None and not known and not teacher.other_vocabulary
        if evaluation is not None and evaluation.fidelity and told:
            return own if DISTRIBUTION in own.needs else build_objective("forward_kl", own.chunk_size)
        if self.config.eval_strategy == IntervalStrategy.NO:
            return None
        return build_objective("cross_entropy", own.chunk_size) if known else own

    def _writings(self) -> Iterator[Writing]:
        """The occasions on which the run writes text."""
        batch, data = self.largest.batch, self.run.recipe.data
        yield from self._questions()
        step = self.config.train_batch_size * self.config.gradient_accumulation_steps
        if "student" in data.shares:
            yield Writing(False, min(step, data.generation.batch_size), batch.student.input_ids.shape[1])
        speaks = self.teacher is not None and self.teacher.writes and not isinstance(self.teacher, CachedTeacher)
        if ("teacher" in data.shares or data.answer == "teacher") and speaks:
            before = data.answer == "teacher"
            rows = data.generation.batch_size if before else min(step, data.generation.batch_size)
            yield Writing(True, rows, batch.teacher_view.input_ids.shape[1], early=before)

    def _questions(self) -> Iterator[Writing]:
        """k-shot answers: the student's to the task that takes most, and those of another model that teaches."""
        run, evaluation = self.run, self.run.recipe.evaluation
        if evaluation is None or run.evaluation is None or run.builder is None:
            return
        asked = []
        for task in (run.evaluation, *run.forgetting):
            if task.shots and task.items:
                shown = task.demonstrations[: max(task.shots)]
                length = longest_prompt(run.builder, task.items, shown) + evaluation.max_new_tokens
                asked.append(Writing(False, min(evaluation.batch_size, len(task.items)), length))
        if asked:
            yield max(asked, key=lambda writing: writing.rows * writing.length)
            if run.recipe.teacher.kind == "local" and run.recipe.teacher.cache is None:
                yield replace(asked[0], teacher=True, early=True)

    def reckon(self, chunk_size: int | None = None) -> Estimate:
        """The estimate, with another chunk size where one is given."""
        chosen = chunk_size or self.run.objective.chunk_size
        chunk = chosen or rows_that_fit(head_size(self.student), self.device)
        scene, notes = self.scene, list(self.notes)
        rehearsed, found = True, {}
        try:
            found = self._rehearse(scene, chunk, notes)
        except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
            rehearsed = False
            notes.append(
                f"Arithmetic alone, generation and evaluation left out: a step of these models can't be rehearsed "
                f"({_first_line(error)})."
            )
            found = self._arithmetic(chunk)
        if self.gathered:
            found["gathered"] = (self.gathered, self.gathered)
        parts = tuple(Part(name, int(found[name][0]), int(found[name][1])) for name in PARTS if name in found)
        return Estimate(parts, str(self.device), self.processes, chunk, rehearsed, tuple(notes), self._figures())

    def _rehearse(self, scene: Scene, chunk: int, notes: list[str]) -> dict[str, tuple[float, float]]:
        try:
            ledger = rehearse(scene, chunk)
        except (RuntimeError, NotImplementedError):
            width, ids = state_width(self.student), head_size(self.student)
            ledger = rehearse(scene, chunk, measured_reader(self.run.objective, width, ids))
            notes.append("The loss looks at numbers: what it takes was measured on a few rows.")
        found: dict[str, tuple[float, float]] = {}
        for name, most in ledger.most.items():
            part = {TEACHER_WEIGHTS: "teacher", "other": "activations"}.get(name, name)
            before = found.get(part, (0.0, 0.0))
            found[part] = before[0] + ledger.peak.get(name, 0), before[1] + most
        return {part: sizes for part, sizes in found.items() if sizes[1] > 0}

    def _arithmetic(self, chunk: int) -> dict[str, tuple[float, float]]:
        """`hfkd.memory`'s figures; the parts that it hasn't are left out."""
        voices = local_members(self.teacher)
        size = ModelSize.of(self.student)
        teacher = ModelSize.of(voices[0].model) if voices else size
        setup = replace(self.setup, chunk=chunk)
        if setup.teacher == "cached":
            teacher = None
        known = asdict(memory(size, teacher, setup))
        if setup.student_dtype == "float32" and not (self.config.bf16 or self.config.fp16):
            known["activations"] *= 2  # they are reckoned in 16 bits there
        if not voices and not _keeps_a_copy(self.teacher):
            known["teacher"] = 0.0
        return {name: (value, value) for name, value in known.items() if name in PARTS and value}

    def _figures(self) -> dict[str, int]:
        batch = self.largest.batch
        rows, length = batch.student.input_ids.shape
        known = {"rows": rows, "student_tokens": length, "supervised_tokens": batch.student.tokens}
        if self.held_out is not None:
            rows, length = self.held_out.student.input_ids.shape
            known |= {"evaluation_rows": rows, "evaluation_tokens": length}
        return {**known, "teacher_tokens": batch.teacher_view.input_ids.shape[1], "prefix": len(self.largest.prefix)}


def _keeps_a_copy(teacher: Teacher | None) -> bool:
    return teacher is not None and not (isinstance(teacher, SelfTeacher) and teacher.kind != "frozen_copy")


def _sharding(config: Any, processes: int) -> Sharding:
    """What the launch cuts, were there so many processes."""
    if processes == 1:
        return "none"
    stage = int(getattr(getattr(config, "deepspeed_plugin", None), "zero_stage", 0) or 0)
    if stage:
        return "full" if stage == 3 else "zero2"
    wanted = getattr(config, "fsdp_plugin_args", None) is not None
    return "full" if wanted or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")) else "none"


def _dtype(model: nn.Module) -> str:
    return str(base_model_of(model).dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")
