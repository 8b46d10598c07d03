"""What a sampler decided as the run went on, each decision with the place from which it counts, so that an epoch can
be drawn again from its beginning; and an endless walk through some examples. Knows numbers alone.

A place is an epoch and the number of examples drawn in it.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import count

import torch
from torch import Tensor


class Course:
    """Decisions in the order of their places."""

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []
        self._decisions: list[Tensor] = []

    def at(self, epoch: int, drawn: int) -> Tensor | None:
        """What counts at a place; None before the first decision."""
        found = bisect_right(self._places, (epoch, drawn))
        return self._decisions[found - 1] if found else None

    def record(self, epoch: int, drawn: int, decision: Tensor) -> None:
        """Keep a decision. Those that counted in earlier epochs only are forgotten: they are never drawn again.

        Args:
            epoch: No earlier than that of the last decision.
            drawn: From which number of drawn examples on it counts; beyond the epoch's end it waits for the next one.
            decision: [n].
        """
        place = (epoch, drawn)
        if self._places and place < self._places[-1]:
            raise ValueError(f"A decision for {place} comes after one for {self._places[-1]}; expected a later place.")
        self._places.append(place)
        self._decisions.append(decision)
        past = max(0, bisect_right(self._places, (epoch, 0)) - 1)
        del self._places[:past], self._decisions[:past]

    def state_dict(self) -> dict[str, Tensor]:
        """`places` [c, 2], `lengths` [c], and all `decisions`, one behind the other."""
        lengths = [len(decision) for decision in self._decisions]
        return {
            "places": torch.tensor(self._places, dtype=torch.int64).reshape(-1, 2),
            "lengths": torch.tensor(lengths, dtype=torch.int64),
            "decisions": torch.cat(self._decisions) if self._decisions else torch.empty(0),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self._places = [(epoch, drawn) for epoch, drawn in state["places"].tolist()]
        self._decisions = list(state["decisions"].split(state["lengths"].tolist())) if self._places else []


def cycle(members: Sequence[int], seed: str) -> Iterator[int]:
    """All members in random order, then all again in another one, for ever.

    Args:
        members: At least one.
        seed: Decides the orders; a text is the same seed on every machine.
    """
    for turn in count():
        yield from random.Random(f"{seed}/{turn}").sample(members, len(members))
