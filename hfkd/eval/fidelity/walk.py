"""Held-out texts, read by student and teacher through the trainer's own evaluation loop and measured batch by batch.

Whatever a student may be wrapped in or spread over, each process runs as many forwards as the others, and texts that
fill up the last batch are left out. What the columns are made of is `token_figures`; their meaning is none of its
business.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from hfkd.batch import Batch
from hfkd.data.views import DistillationDataset
from hfkd.distributed import run_inside
from hfkd.reading import figures_of_batch, student_rows
from hfkd.rows import TopKRows
from hfkd.signal import DISTRIBUTION
from hfkd.student import as_it_was, check_head
from hfkd.teacher_rows import LogitRows, TeacherRows
from hfkd.teachers import Teacher
from hfkd.token_figures import TokenFigures, join
from hfkd.trainer import DistillationTrainer

VOCABULARY = "vocabulary"
"""The support where both distributions are known whole."""


class Walk:
    """Takes the place of a trainer's prediction step: measures each batch and keeps the columns.

    Attributes:
        parts: Columns of the tokens of each batch of this process, repeated texts left out.
        support: What the divergences are taken on.
        top_k: How many ids the masses are taken over.
    """

    def __init__(self, trainer: DistillationTrainer, top_k: int) -> None:
        self.trainer, self.top_k = trainer, top_k
        self.parts: list[TokenFigures] = []
        self.support = VOCABULARY
        self.processes = PartialState().num_processes
        self._seen, self._checked = 0, False
        self._error: ValueError | None = None

    def over(self, dataset: Any) -> TokenFigures:
        """Read all texts.

        Args:
            dataset: Rows or a `DistillationDataset`, as for `trainer.evaluate`.

        Returns:
            The tokens of all processes, sorted by text, the same on each.

        Raises:
            ValueError: The rows of one of the processes can't be measured; on all of them.
        """
        with _unchanged_chance():
            dataloader = self.trainer.get_eval_dataloader(dataset)
            texts = dataloader.dataset
            if isinstance(texts, DistillationDataset):
                self.trainer.teacher.meet(texts, training=False)
            with _same_epoch(texts), as_it_was(self.trainer), self._in_charge():
                self.trainer.evaluation_loop(dataloader, "Fidelity", True, metric_key_prefix="fidelity")
        self._raise_together()
        return join(gather_object(self.parts) if self.processes > 1 else self.parts)

    @contextmanager
    def _in_charge(self) -> Iterator[None]:
        """Be called for each batch of an evaluation. No callback hears of it (a bar would stay open), and the weights
        keep the precision they are trained in, which Trainer else halves for good.
        """
        handler, args = self.trainer.callback_handler, self.trainer.args
        halved = args.bf16_full_eval, args.fp16_full_eval
        self.trainer.prediction_step = self._step
        handler.on_prediction_step = lambda args, state, control: control
        args.bf16_full_eval = args.fp16_full_eval = False
        try:
            yield
        finally:
            args.bf16_full_eval, args.fp16_full_eval = halved
            del self.trainer.prediction_step, handler.on_prediction_step

    def _step(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        """Measure one batch, inside the wrapped forward."""
        batch = Batch.from_inputs(self.trainer._prepare_inputs(inputs))
        module, found = self.trainer.accelerator.unwrap_model(model), []
        with torch.no_grad(), self.trainer.accelerator.autocast():
            # What leaves a wrapped forward may be changed by its hooks, so the columns leave beside it.
            done = run_inside(model, module, lambda *_: self._inside(module, batch, found), batch.student.input_ids)
        if found:
            self._keep(found[0], len(batch.student.labels))
        return done, None, None

    def _inside(self, module: nn.Module, batch: Batch, found: list[TokenFigures]) -> Tensor:
        self._check_heads(module, batch)
        with self._held_back():
            rows = self.trainer.teacher.signal(batch, frozenset({DISTRIBUTION})).rows
            self._look_at(rows)
        student = student_rows(self.trainer, module, batch)
        with self._held_back():
            if self._error is None:
                found.append(figures_of_batch(self.trainer, batch, student, rows, self.top_k))
        return torch.zeros((), device=student.hidden.device)

    @contextmanager
    def _held_back(self) -> Iterator[None]:
        """Keep what is wrong with the rows of this process until the loop is over: the others run forwards, and gather
        what came out, together with it.
        """
        try:
            yield
        except ValueError as error:
            if self.processes == 1:
                raise
            self._error = self._error or error

    def _raise_together(self) -> None:
        """Raise what any process held back."""
        if self.processes == 1:
            return
        said = gather_object([None if self._error is None else str(self._error)])
        if self._error is not None:
            raise self._error
        if words := next(filter(None, said), None):
            raise ValueError(words)

    def _check_heads(self, module: nn.Module, batch: Batch) -> None:
        """As the trainer does before its first step, which takes as long as a batch; so one of the two does it."""
        trainer, flat = self.trainer, self.trainer.args.padding_free
        both = trainer._heads_checked and bool(trainer.objective.needs)
        if not (self._checked or both):
            check_head(module, batch.student, flat)
            trainer.teacher.check_heads(lambda model: check_head(model, batch.teacher_view, flat))
            trainer._heads_checked = True
        self._checked = True

    def _look_at(self, rows: TeacherRows | None) -> None:
        """Refuse rows that the figures can't be taken from, and note those that are known in part."""
        if not isinstance(rows, LogitRows | TopKRows):
            raise ValueError(
                f"The teacher gave {type(rows).__name__}, and fidelity needs its distribution over the student's "
                "vocabulary. Take a teacher that is a model with the student's tokenizer, or a cache with the codec "
                "topk or hidden."
            )
        if not isinstance(rows, TopKRows):
            self.top_k = min(self.top_k, rows.vocab_size)
            return
        if rows.temperature != 1.0:
            raise ValueError(
                f"The teacher's cache was made at temperature {rows.temperature}, and fidelity is measured at 1, to "
                "which likeliest ids can't be converted. Build a cache at temperature 1, or one with the codec hidden."
            )
        listed = rows.ids.shape[-1]
        self.support = VOCABULARY if listed == rows.vocab_size else f"{listed} likeliest ids and a tail"
        self.top_k = min(self.top_k, listed)

    def _keep(self, figures: TokenFigures, texts: int) -> None:
        """Number the texts as one process would, and leave out what filled up the last batch."""
        state = self.trainer.accelerator.gradient_state
        here = PartialState().process_index * texts
        kept = texts
        if state.end_of_dataloader and state.remainder > 0:
            kept = min(max(state.remainder - here, 0), texts)
        self.parts.append(figures.of_texts(self._seen + here + np.arange(texts), kept))
        self._seen += self.processes * texts


def check_teacher(teacher: Teacher | None) -> None:
    """Refuse a teacher whose distributions can't be held against the student's.

    Raises:
        ValueError: There is none, it is known through drawn ids only, or it has another vocabulary.
    """
    if teacher is None:
        raise ValueError(
            "Fidelity compares the student with its teacher, and this trainer has none. Pass `teacher=`, or leave "
            "fidelity out."
        )
    if teacher.drawn:
        raise ValueError(
            "The teacher's cache keeps drawn ids only, which tell neither what it finds likeliest nor how far a token "
            "is from it. Build a cache with the codec topk or hidden, or take a teacher in memory."
        )
    if teacher.other_vocabulary:
        raise ValueError(
            "The teacher has another vocabulary than the student, so their distributions can't be compared token by "
            "token. Compare their answers instead: the metrics answer_agreement and rationale_similarity."
        )


@contextmanager
def _unchanged_chance() -> Iterator[None]:
    """Put the state of all random numbers back: a loader draws a seed whenever it is asked for batches."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _same_epoch(texts: Any) -> Iterator[None]:
    """Put the epoch of the data back, which decides the student's demonstrations: a loader sets it."""
    if not isinstance(texts, DistillationDataset):
        yield
        return
    epoch = texts.epoch
    try:
        yield
    finally:
        texts.set_epoch(epoch)
