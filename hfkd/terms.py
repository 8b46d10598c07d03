"""The summands of an objective: a loss with its name and its weight, from the forms that users write them in.

Knows what losses there are and what they are called in a recipe; it doesn't know how they are summed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from hfkd.losses import LOSSES, STATE_LOSSES, StateLoss, TokenLoss
from hfkd.named import import_class
from hfkd.schedules import Schedule, all_values, constant_or_schedule, described


@dataclass(frozen=True)
class Term:
    """One summand of an objective.

    Args:
        name: How it is logged; unique within the objective.
        loss: What it measures, per token.
        weight: Its factor in force, >= 0.
        schedule: How the factor changes; None for a constant one.
    """

    name: str
    loss: TokenLoss | StateLoss
    weight: float = 1.0
    schedule: Schedule | None = None

    @property
    def weights(self) -> tuple[float, float]:
        """The two ends between which the factor stays."""
        return (self.weight, self.weight) if self.schedule is None else all_values(self.schedule)

    def at(self, step: int, total: int | None) -> Term:
        """The term with its factor after `step` of `total` optimizer steps."""
        if self.schedule is None:
            return self
        try:
            return replace(self, weight=self.schedule.at(step, total))
        except ValueError as error:
            raise ValueError(f"The weight of {self.name}: {error}.") from error

    def describe(self) -> dict[str, Any]:
        """The recipe form."""
        weight = self.weight if self.schedule is None else described(self.schedule)
        return {"name": self.name, "weight": weight, **self.loss.describe()}


def loss_class(kind: str) -> type[TokenLoss] | type[StateLoss]:
    """Find a loss by its recipe key, or by `package.module:Class` for one of the user's own.

    Raises:
        ValueError: There is no such loss (near names are listed), or the class is not one.
    """
    known = {**LOSSES, **STATE_LOSSES}
    if kind in known:
        return known[kind]
    if ":" not in kind:
        near = get_close_matches(kind, known, n=3)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"There is no loss {kind!r}. {hint}Known: {', '.join(known)}; your own is named as package.module:Class."
        )
    return import_class(kind, "kind", TokenLoss, StateLoss)


def as_terms(terms: str | Sequence[Term | Mapping[str, Any]]) -> list[Term]:
    """Read the short form (`"reverse_kl"`), a loss, a term, or a list of them or of their recipe form.

    Raises:
        ValueError: There is no such loss, or it has no such setting, or its weight is no number or schedule.
    """
    if isinstance(terms, (str, Mapping, Term, TokenLoss, StateLoss, type)):
        terms = [terms]
    made: list[Term] = []
    for term in terms:
        if isinstance(term, str):
            term = {"kind": term}
        if isinstance(term, (TokenLoss, StateLoss)):
            term = Term(term.key, term)
        if isinstance(term, Mapping):
            options = dict(term)
            if "kind" not in options:
                raise ValueError(
                    f"The term {options} has no `kind`. Name the loss: one of {', '.join([*LOSSES, *STATE_LOSSES])}."
                )
            kind, weight, name = options.pop("kind"), options.pop("weight", 1.0), options.pop("name", None)
            cls = loss_class(kind)
            weight = constant_or_schedule(weight, f"The weight of {name or cls.key}")
            schedule = weight if isinstance(weight, Schedule) else None
            first = all_values(weight)[0]
            term = Term(name or cls.key, _make_loss(cls, options, name), first, schedule)
        if not isinstance(term, Term):
            raise ValueError(
                f"A term is {term!r}; expected a recipe key, a mapping with `kind`, a loss (an object, not its class) "
                "or a Term."
            )
        made.append(term)
    return made


def _make_loss(cls: type, options: Mapping[str, Any], name: str | None) -> TokenLoss | StateLoss:
    # Without an __init__ of its own a loss has nn.Module's, which seems to take everything.
    bare = cls.__init__ is nn.Module.__init__
    known = {} if bare else inspect.signature(cls).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in known.values())
    unknown = [name for name in options if name not in known]
    if unknown and not takes_all:
        near = get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"{cls.key} has no setting {unknown[0]!r}.{hint} It has: {', '.join(known) or 'none'}.")
    try:
        return cls(**options)
    except ValueError as error:
        raise ValueError(f"The term {name!r}: {error}" if name else str(error)) from error


def check_terms(terms: Sequence[Term]) -> None:
    """Refuse terms that can't be summed or can't teach.

    Raises:
        ValueError: Two share a name, a weight is negative or no number, all weights are 0, or only terms that must not
            stand alone count.
    """
    names = [term.name for term in terms]
    if len(set(names)) != len(names):
        raise ValueError(f"Two terms share a name: {names}. Give each its own with `name`.")
    ends = {term.name: term.weights for term in terms}
    if not all(0 <= weight < math.inf for pair in ends.values() for weight in pair) or not any(
        map(any, ends.values())
    ):
        shown = [term.weight if term.schedule is None else described(term.schedule) for term in terms]
        raise ValueError(f"The weights are {shown}; expected finite numbers, none below 0 and at least one above.")
    counted = [term for term in terms if any(term.weights)]
    if not any(term.loss.may_stand_alone for term in counted):
        lonely = [term.name for term in counted]
        reasons = " ".join(dict.fromkeys(term.loss.why_not_alone for term in counted))
        raise ValueError(
            f"{lonely} would stand alone, but {reasons} Add a term such as forward_kl or cross_entropy"
            + (", or pass `alone: true` if you mean it." if "sinkhorn" in {t.loss.key for t in counted} else ".")
        )
