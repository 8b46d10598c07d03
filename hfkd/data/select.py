"""Which rows play which part: demonstrations, evaluation items, training rows, and those that a run will visit.

Prompts are compared as a reader would: case and white space don't count, and a text equals the same text as a chat
message. Nothing is tokenized here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hfkd.data.messages import Row, prompt_key


class LeakageError(ValueError):
    """A demonstration is among the evaluation items."""


@dataclass
class Splits:
    """The three parts of a data set; no prompt is in two of them."""

    train: list[dict[str, Any]]
    demonstrations: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]


def split_rows(
    rows: Sequence[dict],
    *,
    demonstrations: int,
    evaluation: int,
    seed: int,
    key: Callable[[Row], str] = prompt_key,
) -> Splits:
    """Shuffle rows and deal them out: first the demonstrations, then the evaluation items, the rest is for training.

    Prompts are unique among demonstrations and evaluation items. Further rows with such a prompt are left out of
    training; rows that share a prompt among themselves stay there, as several answers to one question may be wanted.

    Args:
        rows: All rows, in any order.
        demonstrations: How many demonstrations.
        evaluation: How many evaluation items.
        seed: Of the shuffle; the same rows and seed give the same parts everywhere.
        key: What two rows that count as the same have in common: their prompt, or the whole text of a passage
            (`hfkd.data.messages.text_key`).

    Raises:
        ValueError: A number is negative, or too few different prompts are there to leave one row for training.
    """
    if demonstrations < 0 or evaluation < 0:
        raise ValueError(
            f"got demonstrations={demonstrations} and evaluation={evaluation}; expected no negative number"
        )
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    parts: tuple[list, list, list] = ([], [], [])
    taken: set[str] = set()
    for index in order:
        row = dict(rows[index])
        same = key(row)
        if same in taken:
            continue
        part = 0 if len(parts[0]) < demonstrations else 1 if len(parts[1]) < evaluation else 2
        parts[part].append(row)
        if part < 2:
            taken.add(same)
    if not parts[2]:
        different = len({key(row) for row in rows})
        raise ValueError(
            f"{len(rows)} rows with {different} different prompts are too few for {demonstrations} "
            f"demonstrations, {evaluation} evaluation items and at least one training row; give more rows or ask "
            "for fewer"
        )
    return Splits(train=parts[2], demonstrations=parts[0], evaluation=parts[1])


def check_leakage(
    demonstrations: Sequence[Row], evaluation: Sequence[Row], key: Callable[[Row], str] = prompt_key
) -> None:
    """Refuse demonstrations that an evaluation would ask for: their answers stand in the prompt.

    Args:
        demonstrations: Rows that are shown.
        evaluation: Rows that are asked.
        key: As in `split_rows`.

    Raises:
        LeakageError: Names the first prompt that both have.
    """
    shown = {key(row): number for number, row in enumerate(demonstrations)}
    for number, row in enumerate(evaluation):
        same = key(row)
        if same in shown:
            text = same if len(same) <= 200 else same[:197] + "..."
            raise LeakageError(
                f"evaluation item {number} has the prompt of demonstration {shown[same]}: {text!r}; take it out of "
                "one of them, or draw both with `split_rows`, which keeps them apart"
            )


def visited(rows: Sequence[dict], examples: int, seed: int) -> list[dict[str, Any]]:
    """The rows that a run of so many examples visits: all, or a seeded choice of as many, in the order of the data.

    Args:
        rows: The training rows.
        examples: Examples in the whole run, repetitions counted.
        seed: Of the choice.

    Raises:
        ValueError: The run visits no example.
    """
    if examples < 1:
        raise ValueError(
            f"the run visits {examples} examples; expected at least 1, look at max_steps and num_train_epochs"
        )
    chosen = range(len(rows))
    if examples < len(rows):
        chosen = sorted(random.Random(seed).sample(chosen, examples))
    return [dict(rows[index]) for index in chosen]
