"""From rows to one number, with the gradient taken in the forward pass.

An objective is a list of weighted terms. What it returns is a *sum* over tokens in nats: the trainer is the only place
that divides. How the rows are walked over is `hfkd.chunks`; which model or prompt a row came from is not known here.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from hfkd.chunks import Run, Term, plan_chunks
from hfkd.errors import VocabularyError
from hfkd.losses import LOSSES, TokenLoss
from hfkd.rows import DenseRows, Head, RowLayout, TopKRows
from hfkd.signal import TeacherSignal


@dataclass(frozen=True)
class LossSum:
    """What an objective says of some rows; everything is a sum over tokens, nothing is divided.

    Args:
        total: Weighted sum of the terms (nats), a scalar with a gradient.
        parts: Each term's own sum before its weight (nats), detached scalars.
        tokens: The number of rows.
        agreed: Rows on which student and teacher have the same likeliest token; None if it was not asked for.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    agreed: Tensor | None = None


class Objective(nn.Module):
    """Weighted terms over supervised tokens.

    Args:
        terms: A short form (`"reverse_kl"`), a list of terms or of their recipe form (`{"kind": "forward_kl",
            "weight": 0.5}`).
        chunk_size: Rows projected at once; None chooses from the vocabulary's size. The value of the loss doesn't
            depend on it.

    Raises:
        ValueError: No term, a negative weight, weights that sum to nothing, or a loss that must not stand alone does.
    """

    def __init__(self, terms: str | Sequence[Term | Mapping[str, Any]], chunk_size: int | None = None) -> None:
        super().__init__()
        self.terms = _as_terms(terms)
        _check_terms(self.terms, chunk_size)
        self.chunk_size = chunk_size
        self.losses = nn.ModuleList(term.loss for term in self.terms)

    @property
    def needs(self) -> frozenset[str]:
        """What the terms ask a teacher for."""
        return frozenset().union(*(term.loss.needs for term in self.terms))

    def describe(self) -> list[dict[str, Any]]:
        """The terms as plain data, for the run record and the card."""
        return [{"name": term.name, "weight": term.weight, **term.loss.describe()} for term in self.terms]

    def forward(
        self,
        student: DenseRows,
        signal: TeacherSignal | None,
        targets: Tensor,
        weights: Tensor | None = None,
        layout: RowLayout | None = None,
        measure_agreement: bool = False,
    ) -> LossSum:
        """Sum the terms over all rows.

        Args:
            student: N rows of the student.
            signal: The teacher's word on the same rows; None if no term needs one.
            targets: [N] the ids that the tokens really have.
            weights: [N] factors of the rows; None means 1.
            layout: Where the rows come from, for losses that compare rows of a sequence or of a position.
            measure_agreement: Whether to count rows with the same likeliest token.

        Raises:
            ValueError: The rows of student, teacher, targets or weights differ in number.
            VocabularyError: A target lies outside the vocabulary that both models share.
        """
        teacher = None if signal is None else signal.rows
        _check_rows(student, teacher, targets, weights)
        student_head, teacher = _shared_vocabulary(student.head, teacher, targets)
        layout = layout or RowLayout.single(len(student), targets.device)
        chunks = plan_chunks(self.terms, layout, self.chunk_size, student_head.vocab_size)
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        run = Run(self.terms, chunks, student_head, teacher, targets, weights, learned, measure_agreement)
        total, parts = run.total(DenseRows(student.hidden, student_head))
        return LossSum(
            total, {term.name: part for term, part in zip(self.terms, parts, strict=True)}, len(student), run.agreed
        )


def build_objective(
    spec: str | Objective | Sequence[Term | Mapping[str, Any]], chunk_size: int | None = None
) -> Objective:
    """Make an objective from its short or recipe form; one that is ready is returned as it is.

    Args:
        spec: `"forward_kl"`, a list of `{"kind": ..., "weight": ..., ...}`, or an `Objective`.
        chunk_size: See `Objective`.
    """
    return spec if isinstance(spec, Objective) else Objective(spec, chunk_size)


def loss_class(kind: str) -> type[TokenLoss]:
    """Find a loss by its recipe key, or by `package.module:Class` for one of the user's own.

    Raises:
        ValueError: There is no such loss (near names are listed), or the class is not a `TokenLoss`.
    """
    if kind in LOSSES:
        return LOSSES[kind]
    if ":" not in kind:
        near = get_close_matches(kind, LOSSES, n=3)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"There is no loss {kind!r}. {hint}Known: {', '.join(LOSSES)}; your own is named as package.module:Class."
        )
    module_name, _, class_name = kind.partition(":")
    found = getattr(importlib.import_module(module_name), class_name, None)
    if not (isinstance(found, type) and issubclass(found, TokenLoss)):
        raise ValueError(
            f"{kind} is {found!r}; expected a subclass of hfkd.losses.TokenLoss (most derive from Divergence)."
        )
    return found


def _as_terms(terms: str | Sequence[Term | Mapping[str, Any]]) -> list[Term]:
    if isinstance(terms, (str, Mapping, Term, TokenLoss)):
        terms = [terms]
    made: list[Term] = []
    for term in terms:
        if isinstance(term, str):
            term = {"kind": term}
        if isinstance(term, TokenLoss):
            term = Term(term.key, term)
        if isinstance(term, Mapping):
            options = dict(term)
            if "kind" not in options:
                raise ValueError(f"The term {options} has no `kind`. Name the loss: one of {', '.join(LOSSES)}.")
            kind, weight, name = options.pop("kind"), options.pop("weight", 1.0), options.pop("name", None)
            cls = loss_class(kind)
            term = Term(name or cls.key, _make_loss(cls, options), float(weight))
        made.append(term)
    return made


def _make_loss(cls: type[TokenLoss], options: Mapping[str, Any]) -> TokenLoss:
    # Without an __init__ of its own a loss has nn.Module's, which seems to take everything.
    bare = cls.__init__ is nn.Module.__init__
    known = {} if bare else inspect.signature(cls).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in known.values())
    unknown = [name for name in options if name not in known]
    if unknown and not takes_all:
        near = get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"{cls.key} has no setting {unknown[0]!r}.{hint} It has: {', '.join(known) or 'none'}.")
    return cls(**options)


def _check_terms(terms: Sequence[Term], chunk_size: int | None) -> None:
    names = [term.name for term in terms]
    if len(set(names)) != len(names):
        raise ValueError(f"Two terms share a name: {names}. Give each its own with `name`.")
    weights = [term.weight for term in terms]
    if not any(weight > 0 for weight in weights) or not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"The weights are {weights}; expected finite numbers, none below 0 and at least one above.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1 row, or null to have it chosen.")
    company = [term for term in terms if term.weight > 0 and term.loss.may_stand_alone]
    if not company:
        lonely = [term.name for term in terms if term.weight > 0]
        raise ValueError(
            f"{lonely} would stand alone, but it can't tell a student that gives every row its own answer from one "
            f"that gives it a "
            "neighbour's. Add a term such as forward_kl or cross_entropy, or pass `alone: true` if you mean it."
        )


def _check_rows(
    student: DenseRows, teacher: DenseRows | TopKRows | None, targets: Tensor, weights: Tensor | None
) -> None:
    counts = {"student": len(student), "targets": targets.shape[0]}
    if teacher is not None:
        counts["teacher"] = len(teacher)
    if weights is not None:
        counts["weights"] = weights.shape[0]
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"The numbers of rows differ: {counts}. Row i of each must speak of the same supervised token; check the "
            f"labels of both views."
        )


def _shared_vocabulary(
    head: Head, teacher: DenseRows | TopKRows | None, targets: Tensor
) -> tuple[Head, DenseRows | TopKRows | None]:
    """Cut both heads to the ids that both models score: padded vocabularies of one family differ in their tails
    only.
    """
    if teacher is None or teacher.vocab_size == head.vocab_size:
        return head, teacher
    shared = min(teacher.vocab_size, head.vocab_size)
    highest = int(targets.max()) if targets.numel() else 0
    if isinstance(teacher, TopKRows) and teacher.ids.numel():
        highest = max(highest, int(teacher.ids.max()))
    if highest >= shared:
        raise VocabularyError(
            f"The token id {highest} is to be learned, but student and teacher share the first {shared} ids only "
            f"(student {head.vocab_size}, teacher {teacher.vocab_size}). Use models with the same tokenizer."
        )
    if isinstance(teacher, DenseRows):
        return head.first(shared), DenseRows(teacher.hidden, teacher.head.first(shared))
    return head.first(shared), replace(teacher, vocab_size=shared)
