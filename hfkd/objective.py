"""From rows to one number, with the gradient taken in the forward pass.

An objective is a list of weighted terms. What it returns is a *sum* over tokens in nats: the trainer is the only place
that divides. How the rows are walked over is `hfkd.chunks`; which model or prompt a row came from is not known here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from hfkd.chunks import ReadBlock, Run, read_block
from hfkd.errors import VocabularyError
from hfkd.losses import Divergence, StateLoss, StateRows
from hfkd.plan import plan_chunks, rows_that_fit
from hfkd.rows import DenseRows, Head, RowLayout, TopKRows
from hfkd.signal import DISTRIBUTION, TeacherSignal
from hfkd.states import state_count, state_width
from hfkd.support import Tail
from hfkd.teacher_rows import AlignedRows, SampledRows, TeacherRows
from hfkd.terms import Term, as_terms, check_terms

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LossSum:
    """What an objective says of some rows; everything is a sum over tokens, nothing is divided.

    Args:
        total: Weighted sum of the terms (nats), a scalar with a gradient.
        parts: Each term's own sum before its weight (nats), detached scalars.
        tokens: The number of rows.
        agreed: Rows on which student and teacher have the same likeliest token; None if it was not asked for.
        measures: Other figures that were noted on the way, by the name that they are logged under, detached scalars.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    agreed: Tensor | None = None
    measures: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """Weighted terms over supervised tokens.

    Args:
        terms: A short form (`"reverse_kl"`), a list of terms or of their recipe form (`{"kind": "forward_kl",
            "weight": 0.5}`). A weight may be a schedule (`hfkd.schedules.Schedule`).
        chunk_size: Rows projected at once; None chooses from the vocabulary's size and the free memory. The value of
            the loss doesn't depend on it.
        tail: What becomes of the mass outside a sparse teacher's ids: `bucket`, one more entry on both sides, or
            `renormalize`, which leaves the student free to put any mass there.
        compile_losses: Let `torch.compile` fuse the elementwise steps of the terms. Takes some seconds at the first
            step, and a C++ compiler on a CPU.

    Raises:
        ValueError: No term, a negative weight, weights that sum to nothing, or a loss that must not stand alone does.
    """

    def __init__(
        self,
        terms: str | Sequence[Term | Mapping[str, Any]],
        chunk_size: int | None = None,
        tail: Tail = "bucket",
        compile_losses: bool = False,
    ) -> None:
        super().__init__()
        self.terms = as_terms(terms)
        check_terms(self.terms)
        self.losses = nn.ModuleList(term.loss for term in self.terms)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; expected at least 1 row, or null to have it chosen.")
        if tail not in get_args(Tail):
            raise ValueError(f"tail is {tail!r}; expected one of {', '.join(get_args(Tail))}.")
        if compile_losses and any(isinstance(loss, Divergence) and loss.scheduled for loss in self.losses):
            raise ValueError(
                "compile_losses is on and a temperature is a schedule: each new temperature would be compiled anew. "
                "Switch one of the two off."
            )
        if tail == "renormalize":
            logger.warning(
                "tail is 'renormalize': on a sparse teacher's rows the student may put any mass outside the teacher's "
                "ids at no cost. 'bucket' charges it."
            )
        self.chunk_size, self.tail, self.compile_losses = chunk_size, tail, compile_losses
        self._room: int | None = None
        self._read: ReadBlock = read_block

    @property
    def needs(self) -> frozenset[str]:
        """What the terms ask a teacher for."""
        return frozenset().union(*(term.loss.needs for term in self.terms))

    @property
    def layers(self) -> tuple[list[int], list[int]]:
        """The states of student and teacher that the terms read, as numbers of `hidden_states`; after `prepare`."""
        pairs = [pair for loss in self.losses if isinstance(loss, StateLoss) for pair in loss.pairs]
        return sorted({ours for ours, _ in pairs}), sorted({theirs for _, theirs in pairs})

    def prepare(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        """Let the losses make what depends on the models' shapes; once, before the optimizer is made.

        Args:
            student: The student, before it is wrapped.
            teacher: The teacher's model; only losses on states need it.

        Raises:
            ValueError: A term reads states and there is no teacher's model, or its layers don't fit the models.
        """
        head = Head.of(student)
        for term in self.terms:
            if not isinstance(term.loss, StateLoss):
                _check_ids(term, head.vocab_size)
                term.loss.prepare(state_width(student), head.vocab_size)
                term.loss.read_head(head.weight)
                continue
            if teacher is None:
                raise ValueError(
                    f"The term {term.name!r} compares hidden states, and this teacher has no model to take them from. "
                    "Use a teacher that is a model in memory, or leave the term out."
                )
            sizes = state_count(student), state_count(teacher), state_width(student), state_width(teacher)
            try:
                term.loss.prepare(*sizes)
            except ValueError as error:
                raise ValueError(f"The term {term.name!r}: {error}") from error

    def set_step(self, step: int, total: int | None = None) -> None:
        """Put the weights and temperatures of this step in force.

        Args:
            step: Optimizer steps made so far.
            total: Those of the whole run, for schedules that end with it.
        """
        self.terms = [term.at(step, total) for term in self.terms]
        for term in self.terms:
            if not isinstance(term.loss, StateLoss):
                term.loss.set_step(step, total)

    def check_schedules(self, total: int, own_text: bool = False) -> None:
        """Refuse weights that leave some step of a run with nothing to learn from.

        Args:
            total: Optimizer steps of the run.
            own_text: Whether the student may write the text of a step.

        Raises:
            ValueError: A schedule begins after the run, or at some step no term counts, or only terms that must not
                stand alone do.
        """
        schedules = [term.schedule for term in self.terms if term.schedule is not None]
        for step in sorted({step for schedule in schedules for step in schedule.turns(total)}):
            now = [replace(term.at(step, total), schedule=None) for term in self.terms]
            try:
                check_terms(now)
            except ValueError as error:
                raise ValueError(f"At step {step + 1} of {total}: {error}") from error
            if own_text and not any(term.weight for term in now if not term.loss.learns_text):
                raise ValueError(
                    f"At step {step + 1} of {total} all terms that ask the teacher have weight 0, and the student may "
                    "write the text, on which the others are left out: nothing would be learned. Begin above 0, or "
                    "use answer='dataset'."
                )
        self.set_step(0, total)

    def alone(self, name: str) -> Objective:
        """One term with its weight in force, sharing its loss: for asking what it does by itself."""
        one = copy.copy(self)
        one.terms = [term for term in self.terms if term.name == name]
        return one

    def describe(self) -> list[dict[str, Any]]:
        """The terms as plain data, for the run record and the card."""
        return [term.describe() for term in self.terms]

    def forward(
        self,
        student: DenseRows,
        signal: TeacherSignal | None,
        targets: Tensor,
        weights: Tensor | None = None,
        layout: RowLayout | None = None,
        measure_agreement: bool = False,
        states: Mapping[int, Tensor] | None = None,
        own_text: bool = False,
        private: Tensor | None = None,
    ) -> LossSum:
        """Sum the terms over all rows.

        Args:
            student: N rows of the student.
            signal: The teacher's word on the same rows; None if no term needs one.
            targets: [N] the ids that the tokens really have.
            weights: [N] factors of the rows; None means 1.
            layout: Where the rows come from, for losses that compare rows of a sequence or of a position.
            measure_agreement: Whether to count rows with the same likeliest token.
            states: [N, H] the student's states by their number, for losses on states.
            own_text: Whether the student wrote the text; terms that learn the text itself are then left out.
            private: [N] how private each token is, from 0 to 1; None means 0. Terms that learn the text count a token
                that much less.

        Raises:
            ValueError: The rows of student, teacher, targets or weights differ in number, or no term is left.
            VocabularyError: A target lies outside the vocabulary that both models share.
        """
        asked = measure_agreement or DISTRIBUTION in self.needs
        teacher = signal.rows if signal is not None and asked else None
        _check_rows(student, teacher, targets, weights)
        spans = teacher.span if isinstance(teacher, AlignedRows) else None
        layout = replace(layout or RowLayout.single(len(student), targets.device), targets=targets, spans=spans)
        terms = [term for term in self.terms if not (own_text and term.loss.learns_text)]
        if not terms:
            raise ValueError(
                f"The student wrote this text, and the terms {[term.name for term in self.terms]} all learn the text "
                "itself. Add one that asks the teacher."
            )
        rows_of_states = None
        if any(isinstance(term.loss, StateLoss) for term in terms):
            rows_of_states = _state_rows(states, signal, layout, targets)
        head, teacher = shared_vocabulary(student.head, teacher, targets)
        run = self._run(terms, head, teacher, targets, weights, layout, measure_agreement, private)
        totals, parts = [], {}
        if run.terms:
            total, sums = run.total(DenseRows(student.hidden, head))
            totals, parts = [total], {term.name: part for term, part in zip(run.terms, sums, strict=True)}
        for term in terms:
            if isinstance(term.loss, StateLoss):
                value = _state_sum(term, rows_of_states, weights)
                totals.append(term.weight * value)
                parts[term.name] = value.detach()
        measures = {f"loss/{name}": value for name, value in run.measures.items()}
        if isinstance(teacher, TopKRows):
            measures["teacher/captured_mass"] = teacher.log_probs.float().logsumexp(dim=-1).exp().sum()
        parts = {term.name: parts[term.name] for term in terms}
        return LossSum(torch.stack(totals).sum(), parts, len(student), run.agreed if run.terms else None, measures)

    def _run(
        self,
        terms: Sequence[Term],
        head: Head,
        teacher: TeacherRows | None,
        targets: Tensor,
        weights: Tensor | None,
        layout: RowLayout,
        measure_agreement: bool,
        private: Tensor | None,
    ) -> Run:
        """The walk of the terms on tokens."""
        terms = [term for term in terms if not isinstance(term.loss, StateLoss)]
        if self.chunk_size is None and self._room is None:
            self._room = rows_that_fit(head.vocab_size, targets.device)  # once, so that a step repeats to the last bit
        if self.compile_losses and self._read is read_block:
            self._read = torch.compile(read_block)
        chunks = plan_chunks(terms, layout, self.chunk_size or self._room)
        learned = [parameter for term in terms for parameter in term.loss.parameters() if parameter.requires_grad]
        options = {"measure_agreement": measure_agreement, "tail": self.tail, "read": self._read, "private": private}
        return Run(terms, chunks, head, teacher, targets, weights, learned, **options)


def build_objective(
    spec: str | Objective | Sequence[Term | Mapping[str, Any]],
    chunk_size: int | None = None,
    tail: Tail = "bucket",
    compile_losses: bool = False,
) -> Objective:
    """Make an objective from its short or recipe form; one that is ready is returned as it is.

    Args:
        spec: `"forward_kl"`, a list of `{"kind": ..., "weight": ..., ...}`, or an `Objective`.
        chunk_size: See `Objective`, as for the rest.
        tail: What becomes of the mass outside a sparse teacher's ids.
        compile_losses: Whether to fuse elementwise steps.
    """
    return spec if isinstance(spec, Objective) else Objective(spec, chunk_size, tail, compile_losses)


def _check_ids(term: Term, vocab_size: int) -> None:
    """Refuse a loss that is to read more likeliest ids than there are."""
    for name in ("support", "top"):
        asked = term.loss.settings().get(name)
        if isinstance(asked, int) and asked > vocab_size:
            raise ValueError(
                f"The term {term.name!r} is to read the {asked} likeliest ids ({name}), but the vocabulary has "
                f"{vocab_size}. Give {name} at most that."
            )


def _state_rows(
    states: Mapping[int, Tensor] | None, signal: TeacherSignal | None, layout: RowLayout, targets: Tensor
) -> StateRows:
    if states is None or signal is None or signal.states is None:
        lacking = "the student's" if states is None else "the teacher's"
        raise ValueError(
            f"A term compares hidden states, but {lacking} weren't recorded. Pass `states=` of the student and a "
            "signal with `states` (the trainer does), or leave the term out."
        )
    head = signal.rows.head if isinstance(signal.rows, DenseRows) else None
    return StateRows(states, signal.states, layout, targets, head)


def _state_sum(term: Term, rows: StateRows, weights: Tensor | None) -> Tensor:
    """A term on states, summed over the rows."""
    values = term.loss(rows)
    if values.shape != rows.targets.shape:
        raise ValueError(
            f"The loss {term.name!r} returned a tensor of shape {list(values.shape)} for {len(rows.targets)} tokens; "
            f"expected one value per token, [{len(rows.targets)}]."
        )
    return (values if weights is None else values * weights).sum()


def _check_rows(student: DenseRows, teacher: TeacherRows | None, targets: Tensor, weights: Tensor | None) -> None:
    counts = {"student": len(student), "targets": targets.shape[0]}
    if teacher is not None:
        counts["teacher"] = len(teacher)
    if weights is not None:
        counts["weights"] = weights.shape[0]
    if isinstance(teacher, TopKRows | SampledRows) and teacher.ids.shape[-1] > teacher.vocab_size:
        raise ValueError(
            f"The teacher's sparse rows list {teacher.ids.shape[-1]} ids each, but its vocabulary has "
            f"{teacher.vocab_size}. Take at most that many."
        )
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"The numbers of rows differ: {counts}. Row i of each must speak of the same supervised token; check the "
            f"labels of both views."
        )


def shared_vocabulary(head: Head, teacher: TeacherRows | None, targets: Tensor) -> tuple[Head, TeacherRows | None]:
    """Cut both heads to the ids that both models score: padded vocabularies of one family differ in their tails
    only.
    """
    if teacher is None or isinstance(teacher, AlignedRows) or teacher.vocab_size == head.vocab_size:
        return head, teacher
    shared = min(teacher.vocab_size, head.vocab_size)
    highest = int(targets.max()) if targets.numel() else 0
    listed = int(teacher.ids.max()) if isinstance(teacher, TopKRows | SampledRows) and teacher.ids.numel() else 0
    if listed >= shared:
        raise VocabularyError(
            f"The teacher's sparse rows list the token id {listed}, but the student scores {head.vocab_size} ids "
            "only. Make the rows of a teacher that is cut to the student's ids, as `hfkd cache` with its recipe does."
        )
    if highest >= shared:
        raise VocabularyError(
            f"The token id {highest} is to be learned, but student and teacher share the first {shared} ids only "
            f"(student {head.vocab_size}, teacher {teacher.vocab_size}). Use models with the same tokenizer."
        )
    if isinstance(teacher, TopKRows | SampledRows):
        return head.first(shared), replace(teacher, vocab_size=shared)
    return head.first(shared), teacher.first(shared)
