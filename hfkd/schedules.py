"""A number that changes while a run goes on: the weight of a term, or its temperature.

A schedule is a pure function of the step, so that nothing about it has to be kept in a checkpoint. One kind of
number doesn't change while a run goes on but from run to run: with the share of the rows that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

KINDS = ("linear", "cosine", "step", "stairs")
KEPT = "kept"


@dataclass(frozen=True)
class Schedule:
    """From one number to another.

    Args:
        schedule: `linear` or `cosine` (half a wave) between the two steps; or `step`: `start` before `end_step`, `end`
            from there on; or `stairs`: as many equal parts, `start` in the first and `start + (end - start) * k /
            stairs` in the k-th from the second on, so that the last has `end`. With as many stairs as epochs that is
            PS-KD's weight of the previous epoch's distribution, which has no teacher in the first.
        start: The value up to `start_step`.
        end: The value from `end_step` on.
        start_step: Optimizer steps made when the change begins, >= 0.
        end_step: Optimizer steps made when it is over, > `start_step`; None means the last step of the run (a `step`
            needs a number).
        stairs: The number of parts, >= 2; for `stairs` alone.

    Raises:
        ValueError: An unknown kind, a value that is no finite number, an end before the start, or stairs that are
            missing or that nothing climbs.

    Example:
        >>> Schedule("linear", start=1.0, end=0.0, end_step=10).at(5)
        0.5
        >>> [Schedule("stairs", start=0.0, end=1.0, stairs=4).at(step, total=8) for step in range(8)]
        [0.0, 0.0, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
    """

    schedule: str
    start: float
    end: float
    start_step: int = 0
    end_step: int | None = None
    stairs: int | None = None

    def __post_init__(self) -> None:
        """Check by itself; which values make sense is for its owner to say."""
        if self.schedule not in KINDS:
            raise ValueError(f"the schedule is {self.schedule!r}; expected one of {', '.join(KINDS)}")
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in (self.start, self.end)):
            raise ValueError(f"it goes from {self.start!r} to {self.end!r}; expected two finite numbers")
        steps = (self.start_step, self.start_step + 1 if self.end_step is None else self.end_step)
        if not all(isinstance(step, int) and not isinstance(step, bool) for step in steps):
            raise ValueError(f"it goes from step {self.start_step!r} to {self.end_step!r}; expected whole numbers")
        if self.schedule == "step" and self.end_step is None:
            raise ValueError("the step comes at the end of the run, where nothing is left; give `end_step` a number")
        if steps[0] < 0 or steps[1] <= steps[0]:
            raise ValueError(
                f"it starts at step {self.start_step} and ends at step {self.end_step}; expected an end after the "
                "start, and a start at 0 or later"
            )
        if (self.schedule == "stairs") != (self.stairs is not None):
            raise ValueError(
                f"the schedule is {self.schedule!r} with stairs {self.stairs!r}; expected both or neither"
            )
        if self.stairs is not None and (type(self.stairs) is not int or self.stairs < 2):
            raise ValueError(f"it has {self.stairs!r} stairs; expected a whole number of at least 2")
        if self.stairs is not None and self.end_step is not None:
            self._check_room(self.end_step - self.start_step)

    def _check_room(self, steps: int) -> None:
        if steps < self.stairs:
            raise ValueError(
                f"it has {self.stairs} stairs for {steps} steps, so some would have none; expected no more stairs "
                "than steps"
            )

    def at(self, step: int, total: int | None = None) -> float:
        """The value after `step` optimizer steps.

        Args:
            step: Optimizer steps made so far.
            total: Those of the whole run; needed where `end_step` is None.

        Raises:
            ValueError: The end is left to the run, and its length isn't known, is over before the start, or has no
                room for the stairs.
        """
        end = self.end_step
        if end is None:
            if total is None or total <= self.start_step:
                raise ValueError(
                    f"the schedule starts at step {self.start_step} and is to end with the run, which has "
                    f"{total if total is not None else 'an unknown number of'} steps; give `end_step` a number above "
                    "the start, or a longer run"
                )
            if self.stairs is not None:
                return self._on_stairs(step, total)
            end = max(total - 1, self.start_step + 1)  # the last update is made after total - 1 others
        if self.stairs is not None:
            return self._on_stairs(step, end)
        if self.schedule == "step":
            return float(self.end if step >= end else self.start)
        done = min(1.0, max(0.0, (step - self.start_step) / (end - self.start_step)))
        if self.schedule == "cosine":
            done = 0.5 * (1.0 - math.cos(math.pi * done))
        return float(self.start + (self.end - self.start) * done)

    def _on_stairs(self, step: int, end: int) -> float:
        """The value where the last stair is over after `end` steps."""
        self._check_room(end - self.start_step)
        part = (step - self.start_step) * self.stairs // (end - self.start_step) + 1
        if part >= self.stairs:
            return float(self.end)
        return float(self.start if part < 2 else self.start + (self.end - self.start) * part / self.stairs)

    def turns(self, total: int) -> list[int]:
        """The steps of a run from 0 to `total - 1` between which the value doesn't begin or cease to be 0: it changes
        in one direction, and only between its two ends.
        """
        end = total - 1 if self.end_step is None else self.end_step
        steps = [0, self.start_step, self.start_step + 1, end - 1, end, total - 1]
        if self.stairs is not None:
            span = (total if self.end_step is None else end) - self.start_step
            for part in (1, self.stairs - 1):  # the first steps of the second and of the last stair
                first = self.start_step - (-part * span // self.stairs)
                steps += [first - 1, first]
        return sorted({step for step in steps if 0 <= step < total})

    def describe(self) -> dict[str, Any]:
        """The recipe form."""
        return {key: value for key, value in asdict(self).items() if key != "stairs" or value is not None}


def kept_weight(kept: float, full: float, empty: float) -> float:
    """A weight on the straight line between that of all rows and that of none.

    With fewer rows the labels say less and the teacher has to say more, so its weight is to rise as rows are left
    out. That it should is what the paper found; the straight line is ours.

    Paper:
        Ben-Baruch, Botach, Kviatkovsky, Aggarwal and Medioni, 2024, https://arxiv.org/abs/2403.07854.
    Args:
        kept: The share of the rows that is trained on, above 0 and at most 1 (`keep` of the transform `prune`).
        full: The weight where all are.
        empty: What the weight goes to where hardly any is.

    Raises:
        ValueError: The share isn't one, or a weight is no finite number.

    Example:
        >>> round(kept_weight(0.3, full=0.5, empty=1.0), 6)
        0.85
    """
    numbers = (kept, full, empty)
    if not all(isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one) for one in numbers):
        raise ValueError(f"it has kept {kept!r}, full {full!r} and empty {empty!r}; expected finite numbers")
    if not 0 < kept <= 1:
        raise ValueError(f"kept is {kept!r}; expected the share of the rows that is kept, above 0 and at most 1")
    return float(empty + (full - empty) * kept)


def _constant_of_kept(value: Mapping[str, Any], name: str) -> float:
    if set(value) != {"schedule", "kept", "full", "empty"}:
        raise ValueError(
            f"{name} is {dict(value)!r}; expected kept with its three numbers, such as "
            "{schedule: kept, kept: 0.3, full: 0.5, empty: 1.0}."
        )
    try:
        return kept_weight(value["kept"], value["full"], value["empty"])
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from error


def constant_or_schedule(value: float | Mapping[str, Any] | Schedule, name: str) -> float | Schedule:
    """Read a number, or the recipe form of a schedule.

    Args:
        value: A number, a `Schedule`, its fields as a mapping, or `{schedule: kept, kept, full, empty}`, which is a
            number too (see `kept_weight`).
        name: What it is, for messages.

    Raises:
        ValueError: It is neither; the message begins with the name.
    """
    if isinstance(value, Mapping) and value.get("schedule") == KEPT:
        return _constant_of_kept(value, name)
    if isinstance(value, (Schedule, float, int)) and not isinstance(value, bool):
        return value if isinstance(value, Schedule) else float(value)
    known = [field.name for field in fields(Schedule)]
    if (
        not isinstance(value, Mapping)
        or not set(value) <= set(known)
        or not {"schedule", "start", "end"} <= set(value)
    ):
        raise ValueError(
            f"{name} is {value!r}; expected a number, or a schedule such as "
            "{schedule: linear, start: 1.0, end: 0.1, end_step: 500} with the keys " + ", ".join(known) + "."
        )
    try:
        return Schedule(**value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}.") from error


def all_values(value: float | Schedule) -> tuple[float, float]:
    """The two ends between which a number stays."""
    return (value.start, value.end) if isinstance(value, Schedule) else (value, value)


def described(value: float | Schedule) -> float | dict[str, Any]:
    """The recipe form of a number or a schedule."""
    return value.describe() if isinstance(value, Schedule) else value


def in_words(value: float | Mapping[str, Any]) -> str:
    """A number, or the recipe form of a schedule, for a reader."""
    if not isinstance(value, Mapping):
        return f"{value:g}"
    if value["schedule"] == KEPT:
        return f"({_constant_of_kept(value, 'the weight'):g} for a kept share of {value['kept']:g})"
    end = "the last step" if value.get("end_step") is None else f"step {value['end_step']}"
    kind = value["schedule"] if value.get("stairs") is None else f"{value['stairs']} stairs"
    return f"({kind}, {value['start']:g} to {value['end']:g} by {end})"
