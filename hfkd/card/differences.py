"""What the same items, asked of two models, show of a difference: the figures, and what they allow to say.

A report with `differences` has them paired, with intervals of their own. Without them two intervals that are apart are
all that shows anything. A difference that may be none is no finding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hfkd.card.reading import count, entries, number, pair, text
from hfkd.card.results import accuracy_of, items_of, shots_of
from hfkd.card.teaching import demonstrations

STARTS = {"before": "before", "gold": "fine-tuned on gold answers"}
_CHANCE = 0.05


class Difference(NamedTuple):
    """An accuracy less another one on the same items, with its 95 % interval, as shares; `p_value` is McNemar's."""

    items: int
    share: float
    low: float
    high: float
    p_value: float | None

    @property
    def is_shown(self) -> bool:
        """Whether so many items show that there is one at all."""
        return not self.low <= 0 <= self.high and (self.p_value is None or self.p_value < _CHANCE)

    def __str__(self) -> str:
        if (
            self.low >= self.high
        ):  # a bootstrap of changes that are all the same has no width, and that is no certainty
            return f"{100 * self.share:+.1f} (no interval: {'no item' if not self.share else 'each item'} changed)"
        return f"{100 * self.share:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def difference_of(report: Mapping[str, Any], task: str, shots: str, start: str) -> Difference | None:
    """After less `start` (`before` or `gold`).

    Args:
        report: What `report.json` holds.
        task: The name of another task; empty for the one that was trained.
        shots: The demonstrations in the prompt.
        start: What it is held against.
    """
    others = {text(one, "task") for one in entries(report, "forgetting")}
    found = None
    for one in entries(report, "differences"):
        name = text(one, "task")
        ours = name == task if task else name not in others
        if ours and (text(one, "from"), text(one, "to"), str(one.get("shots"))) == (start, "after", shots):
            found = one
    share, ends = number(found, "difference"), pair(found, "interval")
    if share is None or ends is None:
        return None
    return Difference(count(found, "items"), share, *ends, number(found, "p_value"))


def difference_rows(
    report: Mapping[str, Any], task: str, details: Mapping[str, Any]
) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the differences by demonstrations; empty where a report has none."""
    found = {
        start: {shots: one for shots in shots_of(details) if (one := difference_of(report, task, shots, start))}
        for start in STARTS
    }
    found = {start: known for start, known in found.items() if known}
    heads = [head for start in found for head in (f"after less {STARTS[start]}, points", "p")]
    rows = []
    for shots in shots_of(details):
        cells = [_cells(known.get(shots)) for known in found.values()]
        if any(cell != "-" for one in cells for cell in one):
            rows.append([shots, *(cell for one in cells for cell in one)])
    return (["shots", *heads], rows) if rows else ([], [])


def _chance(one: Difference) -> str:
    return "" if one.p_value is None else f", p {_cells(one)[1]}"


def _cells(one: Difference | None) -> tuple[str, str]:
    if one is None:
        return "-", "-"
    return str(one), "-" if one.p_value is None else "under 0.001" if one.p_value < 0.001 else f"{one.p_value:.3f}"


class _Compared(NamedTuple):
    """What is known of one number of demonstrations: `way` is better, worse or nothing that shows."""

    way: str
    share: float
    paired: bool
    words: str


def _compared(report: Mapping[str, Any], task: str, details: Mapping[str, Any], start: str) -> Iterator[_Compared]:
    for shots in shots_of(details):
        then, now = accuracy_of(details, start, shots), accuracy_of(details, "after", shots)
        known = difference_of(report, task, shots, start)
        if then is None or now is None:
            continue
        words = f"with {demonstrations(shots)} {then.share:.1%} {_SIDES[start][0]}, {now.share:.1%} {_SIDES[start][1]}"
        share = now.share - then.share
        if known is not None:
            share, words = known.share, f"{words}, {known} points{_chance(known)}"
        apart = known.is_shown if known else now.low > then.high or then.low > now.high
        yield _Compared("" if not apart else "better" if share > 0 else "worse", share, known is not None, words)


_SIDES = {"before": ("before", "after"), "gold": ("by the gold answers", "by the teacher")}


def against_before(report: Mapping[str, Any], details: Mapping[str, Any]) -> Iterator[str]:
    """Where training made the model worse at its own task, or didn't show that it made anything of it."""
    found = list(_compared(report, "", details, "before"))
    if worse := [one.words for one in found if one.way == "worse"]:
        yield f"It became worse at its own task: {'; '.join(worse)}."
    yield from _no_difference("Before and after training", found, details)


def against_gold(report: Mapping[str, Any], details: Mapping[str, Any]) -> Iterator[str]:
    """Where fine-tuning on the gold answers does as well, as far as can be seen, or better."""
    found = list(_compared(report, "", details, "gold"))
    if worse := [one.words for one in found if one.way == "worse"]:
        yield (
            f"Fine-tuning on the gold answers, at the same budget, does better: {'; '.join(worse)}. With labels at "
            "hand the teacher brought nothing there."
        )
    for line in _no_difference("Against fine-tuning on the gold answers, at the same budget", found, details):
        yield f"{line} That the teacher brought more than labels would have isn't shown there."


def against_forgetting(report: Mapping[str, Any], task: str, details: Mapping[str, Any]) -> Iterator[str]:
    """What another task lost."""
    found = [one for one in _compared(report, task, details, "before") if one.share < 0]
    if worse := [one.words for one in found if one.way == "worse"]:
        yield f"On {task}, which was not trained, it became worse: {'; '.join(worse)}."
    yield from _no_difference(f"On {task}, which was not trained", found, details)


def _no_difference(where: str, found: list[_Compared], details: Mapping[str, Any]) -> Iterator[str]:
    """What so many items leave open, paired and not."""
    few = f"{items_of(details)} items" if items_of(details) else "so many items"
    if paired := [one.words for one in found if not one.way and one.paired]:
        yield f"{where}, this is no difference that {few} can show: {'; '.join(paired)}."
    if apart := [one.words for one in found if not one.way and not one.paired]:
        yield f"{where}: the intervals overlap, so taken by themselves they show no difference ({'; '.join(apart)})."
