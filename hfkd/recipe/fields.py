"""What a key of a recipe may hold by itself: numbers, texts, and the few forms written in more than one way."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hfkd.recipe.source import near


def no_bool(value: Any) -> Any:
    """Anything but true and false, which count as numbers."""
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


def expand_shots(value: Any) -> Any:
    """`{min: 1, max: 3}` means 1, 2 or 3; one number means always that many."""
    if isinstance(value, dict):
        if set(value) != {"min", "max"} or not all(type(part) is int for part in value.values()):
            raise ValueError("expected a list of numbers of demonstrations, or {min: 1, max: 3}")
        if value["min"] > value["max"]:
            raise ValueError(f"expected min <= max, and min is {value['min']} while max is {value['max']}")
        return list(range(value["min"], value["max"] + 1))
    return [value] if isinstance(value, int) else value


def weight_or_schedule(value: Any) -> Any:
    """A number, or a schedule, whose keys the objective checks."""
    if isinstance(value, dict):
        return value
    try:
        number = float(no_bool(value))
    except (TypeError, ValueError):
        raise ValueError("expected a number, or a schedule such as {schedule: linear, start: 1.0, end: 0.1}") from None
    if not 0 <= number < float("inf"):
        raise ValueError("expected greater than or equal to 0, and finite")
    return number


def names_or_one(value: Any) -> Any:
    """A name, or a list of names."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(part, str) for part in value)):
        return value
    raise ValueError("expected a name, such as all-linear, or a list of names")


def block_numbers(value: Any) -> Any:
    """How many blocks, or which."""
    if value is None or type(value) is int and value >= 1:
        return value
    numbers = isinstance(value, list) and value and all(type(part) is int and part >= 0 for part in value)
    if numbers and all(before < after for before, after in zip(value, value[1:], strict=False)):
        return value
    raise ValueError(
        "expected how many blocks to keep, or their numbers from 0, each larger than the one before, such as [0, 3, 6]"
    )


def writer_or_shares(value: Any) -> Any:
    """Who writes the answers: a name, or shares of several; what the names mean is said elsewhere."""
    if isinstance(value, str) and value in WRITERS:
        return value
    if isinstance(value, dict) and value and set(value) <= set(WRITERS):
        numbers = [number for number in value.values() if type(number) in (int, float) and 0 <= number < float("inf")]
        if len(numbers) == len(value) and sum(numbers) > 0:
            return value
    hint = near(value, WRITERS) if isinstance(value, str) else ""
    raise ValueError(f"expected {', '.join(WRITERS)}, or shares of them such as {{student: 0.5, dataset: 0.5}}{hint}")


def epoch_or_steps(value: Any) -> Any:
    """`epoch`, or a number of steps."""
    if value == "epoch" or (type(value) is int and value >= 1):
        return value
    raise ValueError("expected epoch, or a number of optimizer steps, at least 1")


WRITERS = ("dataset", "teacher", "student")

Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Number = Annotated[float, BeforeValidator(no_bool), Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
ShotsOrNone = Annotated[list[Count], BeforeValidator(expand_shots)]
Shots = Annotated[ShotsOrNone, Field(min_length=1)]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Options = dict[str, Any]
