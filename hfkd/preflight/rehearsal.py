"""A step of training on ghosts, and what is written and read around it: every tensor that it would make, by what it is
for, and none of their numbers.

Run with the student's own blocks, adapter, checkpointing and attention, the teacher's, the terms of the loss and the
optimizer, on the largest micro-batch: state of the optimizer is there, and gradients of earlier micro-batches
are where there are some. Which models and which texts is not its business.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._python_dispatch import _disable_current_modes
from transformers import Trainer

from hfkd.batch import Batch
from hfkd.chunks import ReadBlock, read_block
from hfkd.config import DistillationConfig
from hfkd.errors import UnsupportedCache
from hfkd.objective import Objective
from hfkd.packing import drop_padding, run_view
from hfkd.preflight.bare import every_member, local_members
from hfkd.preflight.ghosts import Ghosts, Ledger
from hfkd.preflight.largest import Largest
from hfkd.rollout.hf import generation_mode
from hfkd.rows import DenseRows, Head, RowLayout, decode, supervised
from hfkd.sharding import Launch
from hfkd.signal import STATES
from hfkd.states import recording
from hfkd.support import TokenChunk
from hfkd.teachers import ModelTeacher, Teacher
from hfkd.terms import Term

PARTS = (
    *("weights", "gradients", "optimizer", "activations", "objective"),
    *("teacher", "prefix cache", "generation", "evaluation", "gathered", "communication"),
)
"""What memory is for, in the order in which it is shown."""

TEACHER_WEIGHTS = "teacher's weights"
"""A part of its own within the ledger: shards divide the weights and not what is made of them."""


@dataclass(frozen=True)
class Writing:
    """An occasion on which texts are written.

    Args:
        teacher: Whether it's the teacher that writes.
        rows: How many texts at once.
        length: Of the longest, its prompt included, in tokens.
        early: Whether it is over before there is an optimizer.
    """

    teacher: bool
    rows: int
    length: int
    early: bool = False


@dataclass(frozen=True)
class Reading:
    """Held-out texts that are read without learning: by fidelity, and by evaluations in training.

    Args:
        batch: The largest one.
        objective: What both models' rows go through; the scene's own, or one in its place.
    """

    batch: Batch
    objective: Objective


@dataclass(frozen=True)
class Scene:
    """What a step is made of.

    Args:
        student: Bare or loaded, with its adapter.
        teacher: Not prepared.
        objective: Of the run; it stays as it is.
        largest: The micro-batch.
        config: The run's.
        device: Where all of it would lie.
        shares: How much of a part one process holds, see `Ledger`.
        buckets: Whether gradients lie a second time in what processes exchange, as DDP has it.
        writings: The occasions on which texts are written.
        reading: Held-out texts that are read; None where none are.
    """

    student: nn.Module
    teacher: Teacher | None
    objective: Objective
    largest: Largest
    config: DistillationConfig
    device: torch.device
    shares: Mapping[str, float] = field(default_factory=dict)
    buckets: bool = False
    writings: tuple[Writing, ...] = ()
    reading: Reading | None = None


def rehearse(scene: Scene, chunk_size: int | None = None, read: ReadBlock | None = None) -> Ledger:
    """Run one step on ghosts.

    Args:
        scene: What it is made of.
        chunk_size: In the place of the objective's own.
        read: In the place of the terms, where they can't be run on ghosts (see `measured_reader`).

    Returns:
        The peak, by part.

    Raises:
        RuntimeError: Something looks at numbers that a ghost hasn't.
    """
    ledger = Ledger(scene.shares)
    with Ghosts(ledger) as ghosts, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training says the same, of tensors that have numbers
        return _Step(scene, ledger, ghosts, chunk_size, read).run()


class _Step:
    """One step under way."""

    def __init__(
        self, scene: Scene, ledger: Ledger, ghosts: Ghosts, chunk_size: int | None, read: ReadBlock | None
    ) -> None:
        self.scene, self.ledger, self.config = scene, ledger, scene.config
        self.student = ghosts.of(scene.student, scene.device, "weights")
        self.teacher = _teacher(scene, ghosts)
        self.objective = _rehearsing(scene.objective, chunk_size)
        if read is not None:
            self.objective._read = read
        self.reading = self.objective
        if scene.reading is not None and scene.reading.objective is not scene.objective:
            self.reading = _rehearsing(scene.reading.objective, chunk_size)

    def run(self) -> Ledger:
        """Prepare as the trainer does, write and read, then one step; the ledger has the peak of all."""
        ledger, batch = self.ledger, self.scene.largest.batch
        self._prepare()
        learning = [one for one in self._parameters() if one.requires_grad]
        for one in learning:
            one.register_post_accumulate_grad_hook(lambda one: ledger.take(one.grad, "gradients"))
        ledger.begin()
        self._share_prefix()
        for writing in self.scene.writings:
            if writing.early:
                self._write(writing)
        optimizer = self._optimizer(learning)
        communicated = self._buckets(learning)
        for writing in self.scene.writings:
            if not writing.early:
                self._write(writing)
        self._read()
        if self.config.gradient_accumulation_steps > 1:
            self._gradients(learning)  # of the micro-batch before
        self._loss(batch).backward()
        with ledger.entry("optimizer"):
            if self.config.max_grad_norm:
                grads = [one.grad for one in learning if one.grad is not None]
                clip_grads_with_norm_(learning, self.config.max_grad_norm, get_total_norm(grads))
            optimizer.step()
        del communicated
        return ledger

    def _prepare(self) -> None:
        scene, student, teacher = self.scene, self.student, self.teacher
        if self.config.padding_free:
            drop_padding(student)
        if teacher is not None:
            with self.ledger.entry(TEACHER_WEIGHTS):
                teacher.prepare(Launch(scene.device), student)
            if self.config.padding_free:
                teacher.drop_padding()
        with self.ledger.entry("weights"):
            if STATES in self.objective.needs:
                with teacher.weights() as model:
                    self.objective.prepare(student, model)
                teacher.keep_states(self.objective.layers[1])
            else:
                self.objective.prepare(student)
        student.train()
        _checkpointing(student, self.config)

    def _parameters(self) -> Iterator[nn.Parameter]:
        yield from self.student.parameters()
        yield from self.objective.parameters()

    def _optimizer(self, learning: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the run with its state, which is made in its first step."""
        made, options = Trainer.get_optimizer_cls_and_kwargs(self.config, self.student)
        optimizer = made(list(learning), **options)
        self._gradients(learning)
        with self.ledger.entry("optimizer"):
            optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def _gradients(self, learning: Iterable[nn.Parameter]) -> None:
        with self.ledger.entry("gradients"):
            for one in learning:
                one.grad = torch.zeros_like(one)

    def _buckets(self, learning: Iterable[nn.Parameter]) -> list[Tensor]:
        with self.ledger.entry("communication"):
            return [torch.empty_like(one) for one in learning] if self.scene.buckets else []

    def _share_prefix(self) -> None:
        """Run what all prompts of the teacher begin with, and keep its keys and values."""
        if self.teacher is None or not self.objective.needs:
            return
        self.teacher.share_prefix(self.scene.largest.prefix)
        for member in every_member(self.teacher):
            if isinstance(member, ModelTeacher) and member.prefix is not None:
                with self.ledger.entry("prefix cache"), torch.no_grad(), member.weights() as model:
                    try:
                        member.prefix.cache_for(model, 1)
                    except UnsupportedCache:
                        member.prefix = None  # every prompt is run whole, as in training

    def _write(self, writing: Writing) -> None:
        """Keys and values of all rows at their longest, what the layers make of them in one pass, and logits of one
        token a row.
        """
        ids = torch.zeros(writing.rows, writing.length, dtype=torch.long, device=self.scene.device)
        speaker = self.teacher.weights() if writing.teacher else nullcontext(self.student)
        with self.ledger.entry("generation"), torch.no_grad(), speaker as model, generation_mode(model):
            kept = decode(model, ids, torch.ones_like(ids), use_cache=True)
            Head.of(model).logits(kept.last_hidden_state[:, -1]).float()

    def _read(self) -> None:
        """What both models make of held-out texts, with nothing kept to learn from."""
        if self.scene.reading is None:
            return
        self.student.eval()
        with torch.no_grad():
            self._sum(self.scene.reading.batch, self.reading, "evaluation")
        self.student.train()

    def _loss(self, batch: Batch) -> Tensor:
        """What `DistillationTrainer` does with a micro-batch, each part under its name."""
        total = self._sum(batch, self.objective)
        self.ledger.part = "activations"  # what the backward makes on its way to the gradients
        return total

    def _sum(self, batch: Batch, objective: Objective, part: str | None = None) -> Tensor:
        """Run teacher, student and objective, each under its name or all under one."""
        ledger, view = self.ledger, batch.student
        asked = self.teacher is not None and bool(objective.needs)
        with _autocast(self.config, self.scene.device):
            with ledger.entry(part or "teacher"):
                signal = self.teacher.signal(batch, objective.needs) if asked else None
            with ledger.entry(part or "activations"):
                with recording(self.student, objective.layers[0]) as recorder:
                    hidden, labels = run_view(self.student, view, self.config.padding_free)
                states = {layer: supervised(one, labels) for layer, one in recorder.finish(hidden).items()}
                student = DenseRows(supervised(hidden, labels), Head.of(self.student))
            with ledger.entry(part or "objective"):
                rows = (student, signal, view.targets, batch.token_weights, RowLayout.of(view.labels))
                measure = self.config.log_agreement and signal is not None
                result = objective(*rows, measure_agreement=measure, states=states)
        return result.total


def _rehearsing(objective: Objective, chunk_size: int | None) -> Objective:
    """A copy that can be run on ghosts."""
    made = copy.deepcopy(objective)
    made.compile_losses = False
    made.chunk_size = chunk_size or made.chunk_size
    return made


def _checkpointing(student: nn.Module, config: DistillationConfig) -> None:
    """Let the student keep only the inputs of its layers, as Trainer does."""
    if not config.gradient_checkpointing:
        return
    options = dict(config.gradient_checkpointing_kwargs or {})
    if hasattr(student, "activation_checkpointing_enable"):  # since transformers 5.2x, with two options of its own
        own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        student.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **own)
    else:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)


def _teacher(scene: Scene, ghosts: Ghosts) -> Teacher | None:
    """The teacher with ghosts in the place of its models."""
    teacher = copy.copy(scene.teacher)
    if hasattr(teacher, "teachers"):
        teacher.teachers = {name: copy.copy(member) for name, member in teacher.teachers.items()}
    for member in local_members(teacher):
        member.model = ghosts.of(member.model, scene.device, TEACHER_WEIGHTS)
        member.offload = False  # what is streamed is counted by the share of the teacher that is held
    return teacher


@contextmanager
def _autocast(config: DistillationConfig, device: torch.device) -> Iterator[None]:
    dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    with nullcontext() if dtype is None else torch.autocast(device.type, dtype):
        yield


_MEASURED = 2**22
"""Logits that a loss is measured on at most."""


def measured_reader(objective: Objective, width: int, vocab_size: int) -> ReadBlock:
    """Stand in for terms that look at numbers: run them for real on as many rows as they are given, and take as much
    memory. Of many rows a few are run, and the rest is taken to grow with them.

    Args:
        objective: It stays as it is.
        width: H of the student.
        vocab_size: V.

    Returns:
        What takes the place of `hfkd.chunks.read_block` in a rehearsal.
    """
    known: dict[tuple[str, ...], float] = {}

    def read(asked: list[Term], chunk: TokenChunk, weights: Tensor | None) -> list[Tensor]:
        rows = max(1, min(len(chunk), _MEASURED // vocab_size))
        key = (str(rows), *(term.name for term in asked))
        if key not in known:
            terms = [copy.deepcopy(term) for term in objective.terms if term.name in key[1:]]
            known[key] = _buffers(terms, rows, width, vocab_size, objective.tail)
        logits = chunk._student_logits
        taken = logits.new_empty(max(0, round((known[key] - 1) * logits.numel())))
        values = [logits.sum() for _ in asked]  # its gradient is one buffer more
        del taken
        return values

    return read


def _buffers(terms: list[Term], rows: int, width: int, vocab_size: int, tail: Any) -> float:
    """How many times the logits of a model the terms take at once, the logits themselves not counted."""
    with _really():
        for term in terms:
            term.loss.prepare(width, vocab_size)
        ledger = Ledger()
        with Ghosts(ledger, real=True):
            targets = torch.arange(rows) % vocab_size
            leaf, teacher = torch.randn(rows, vocab_size).requires_grad_(), torch.randn(rows, vocab_size)
            hidden = torch.randn(rows, width)
            before = ledger.total
            ledger.begin()
            chunk = TokenChunk(targets, leaf, teacher, tail=tail, hidden=hidden, group=0)
            torch.autograd.grad(sum(read_block(terms, chunk, None)), [leaf], allow_unused=True)
        return (sum(ledger.peak.values()) - before) / leaf.nbytes


@contextmanager
def _really() -> Iterator[None]:
    """Out of the ghosts for a moment."""
    with _disable_current_modes(), torch.enable_grad():
        yield
