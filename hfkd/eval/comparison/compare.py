"""Compares runs item by item: a difference of accuracies with its interval, from the items that both were asked.

Two runs on the same items are paired: what is easy or hard about an item drops out of the difference, which therefore
has a narrower interval than the two accuracies seem to allow. Takes plain data; how it is read from files is
`hfkd.eval.comparison.sides`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hfkd.eval.comparison.asking import differences
from hfkd.eval.generation import is_long, text_likeness

DRAWS = 10_000
_ROOM = 4_000_000
Key = tuple[str, int]


@dataclass(frozen=True)
class Series:
    """What one model scored on the items of a task, in one way of asking.

    Attributes:
        task: Name of the task.
        measure: How it was asked (`0-shot`), or what was measured (`acc`).
        scores: By item (hash, and how often it occurred before) a score, 1 and 0 for right and wrong.
        answers: By item the short answer and the gold one; empty where they aren't known.
        texts: By item what was written; empty where it isn't known.
        asked: How, see `hfkd.eval.comparison.asking.way_of_asking`; empty where it isn't known.
    """

    task: str
    measure: str
    scores: dict[Key, float]
    answers: dict[Key, tuple[str, str]] = field(default_factory=dict)
    texts: dict[Key, str] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """One run, at one stage.

    Attributes:
        name: How it is shown.
        series: What it scored.
        fidelity: The figures of `hfkd.eval.fidelity`, or empty.
    """

    name: str
    series: list[Series]
    fidelity: Mapping[str, Any] = field(default_factory=dict)


def bootstrap_interval(values: Sequence[float], draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of a mean, over drawings of the items with replacement.

    Each drawing is made as counts of the different values (a multinomial), which is the same thing and takes no
    memory for items.

    Args:
        values: One for each item, at least one.
        draws: How many drawings.
        seed: Of the drawings.
    """
    different, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    items, random, means = int(counts.sum()), np.random.default_rng(seed), []
    at_once = max(1, _ROOM // len(different))
    for start in range(0, draws, at_once):
        drawn = random.multinomial(items, counts / items, size=min(at_once, draws - start))
        means.append(drawn @ different / items)
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def sign_test(gained: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test: how likely a split at least as uneven is by chance.

    Args:
        gained: Items that only the second got right.
        lost: Items that only the first got right.
    """
    together, fewer = gained + lost, min(gained, lost)
    if together == 0:
        return 1.0
    tail = sum(math.comb(together, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**together)


def paired(first: Sequence[float], second: Sequence[float], draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """How far the second scores are from the first ones, item by item.

    Args:
        first: The score of each item, 1 and 0 for right and wrong, or any number.
        second: Of the same items.
        draws: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        The `difference` of the means with its 95 % `interval`, how many items were `gained` and `lost`, and the
        `p_value` of `sign_test` (None where scores aren't right or wrong).
    """
    before, after = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    moved = after - before
    gained, lost = int((moved > 0).sum()), int((moved < 0).sum())
    binary = bool(np.isin(np.concatenate([before, after]), (0.0, 1.0)).all())
    return {
        "difference": float(moved.mean()),
        "interval": list(bootstrap_interval(moved, draws, seed)),
        "gained": gained,
        "lost": lost,
        "p_value": sign_test(gained, lost) if binary else None,
    }


def compare_sides(sides: Sequence[Side], *, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Hold each side against the first one.

    Args:
        sides: Two at least.
        draws: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        `rows`, one for each task, measure and side but the first: `task`, `measure`, `side`, `shared` (items),
        `first_score` and `score` on these, `difference` with its 95 % `interval`, `gained` and `lost` (items), the
        `p_value` of `sign_test` (null where scores aren't right or wrong), `answer_agreement` (with the items on which
        `both_unanswered`, which agree), and
        `rationale_similarity` where the texts are long. `warnings`, and `fidelity` by the name of the side.

    Raises:
        ValueError: There are fewer than two, or the others share no item with the first.
    """
    if len(sides) < 2:
        raise ValueError(f"got {len(sides)} to compare; expected two at least")
    first, rows, warnings = sides[0], [], []
    for mine in first.series:
        for side in sides[1:]:
            theirs = _counterpart(mine, side, first)
            if theirs is None:
                warnings.append(f"{side.name} has nothing like {mine.task}, {mine.measure}.")
                continue
            shared = [key for key in mine.scores if key in theirs.scores]
            row = {"side": side.name, **_compared(mine, theirs, shared, draws, seed)}
            rows.append(row)
            warnings += _doubts(first.name, mine, side.name, theirs, row)
    if not rows:
        raise ValueError(
            f"{first.name} and {', '.join(side.name for side in sides[1:])} have no item in common, so nothing can be "
            "compared; evaluate them on the same rows (`hfkd evaluate RUN --json FILE`, with the same evaluation "
            "section) and compare the files"
        )
    fidelity = {side.name: dict(side.fidelity) for side in sides if side.fidelity}
    return {"first": first.name, "rows": rows, "warnings": list(dict.fromkeys(warnings)), "fidelity": fidelity}


def _counterpart(mine: Series, side: Side, first: Side) -> Series | None:
    """What was asked alike: the task of the same name, if they share items; else the one that shares most, unless the
    first side has it, too, under its own name.
    """
    alike = [other for other in side.series if other.measure == mine.measure and _shared(mine, other)]
    for other in alike:
        if other.task == mine.task:
            return other
    free = [other for other in alike if not any(_same(other, own) for own in first.series)]
    return max(free, key=lambda other: _shared(mine, other), default=None)


def _same(other: Series, own: Series) -> bool:
    return (own.task, own.measure) == (other.task, other.measure) and _shared(own, other) > 0


def _shared(one: Series, other: Series) -> int:
    return len(one.scores.keys() & other.scores.keys())


def _doubts(first: str, mine: Series, side: str, theirs: Series, row: Mapping[str, Any]) -> Iterator[str]:
    """What a reader of a row must know: other tasks, items and ways of asking, and figures that say little."""
    where, shared = f"{mine.task}, {mine.measure}", row["shared"]
    if theirs.task != mine.task:
        yield f"{where}: what {first} calls {mine.task} is compared with what {side} calls {theirs.task}."
    if shared < max(len(mine.scores), len(theirs.scores)):
        yield (
            f"{where}: {first} was asked {len(mine.scores)} items and {side} {len(theirs.scores)}; the {shared} that "
            "both were asked are compared."
        )
    if differ := differences(mine.asked, theirs.asked, shown=mine.measure != "0-shot"):
        yield f"{first} and {side} were asked in other ways, which may be all that differs: {'; '.join(differ)}."
    if row["interval"][0] == row["interval"][1]:
        yield (
            f"{where}: all {shared} items moved alike, so drawing them again says nothing and the interval has no "
            "width."
        )
    if unanswered := row.get("answer_agreement", {}).get("both_unanswered"):
        yield (
            f"{where}: on {unanswered} of {shared} items neither {first} nor {side} gave an answer, which Alike "
            "counts as the same one."
        )


def _compared(mine: Series, theirs: Series, shared: Sequence[Key], draws: int, seed: int) -> dict[str, Any]:
    before = [mine.scores[key] for key in shared]
    after = [theirs.scores[key] for key in shared]
    row = {
        "task": mine.task,
        "measure": mine.measure,
        "shared": len(shared),
        "first_score": float(np.mean(before)),
        "score": float(np.mean(after)),
        **paired(before, after, draws, seed),
    }
    return {**row, **_answers_alike(mine, theirs, shared)}


def _answers_alike(mine: Series, theirs: Series, shared: Sequence[Key]) -> dict[str, Any]:
    """How often both gave the same answer, and how alike what they wrote is."""
    found: dict[str, Any] = {}
    if mine.answers and theirs.answers:
        found["answer_agreement"] = _answer_agreement(
            [theirs.answers[key][0] for key in shared],
            [mine.answers[key][0] for key in shared],
            [mine.answers[key][1] for key in shared],
        )
    texts, others = ([one.texts[key] for key in shared if key in one.texts] for one in (theirs, mine))
    if len(texts) == len(others) == len(shared) and is_long(others):
        found["rationale_similarity"] = text_likeness(texts, others)
    return found


def _answer_agreement(predictions: list[str], references: list[str], golds: list[str]) -> dict[str, Any]:
    """Of the metric module `answer_agreement`; the first side stands where the teacher does."""
    from hfkd.eval.metrics import load_metric

    found = load_metric("answer_agreement").compute(predictions=predictions, references=references, gold=golds)
    return {
        "agreement": found["agreement"],
        "interval": list(found["agreement_interval"]),
        "both_unanswered": found["both_unanswered"],
        "first_wrong": found["teacher_wrong"],
        "agreement_when_first_wrong": found["agreement_when_teacher_wrong"],
    }
