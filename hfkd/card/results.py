"""The figures of a report: accuracies by shots, fidelity to the teacher and calibration, as tables and as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hfkd.card.markdown import Markdown, bullets, table
from hfkd.card.reading import count, entries, number, pair, section, text
from hfkd.intervals import wilson_interval

STAGES = {"before": "before", "after": "after", "gold": "fine-tuned on gold answers", "teacher": "teacher"}


class Accuracy(NamedTuple):
    """One accuracy with its 95 % interval, all three as shares."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.share:.1%} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def details_of(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The k-shot results by stage and shots; of a report that has accuracies alone, these."""
    if details := section(report, "k_shot_details"):
        return details
    return _plain(section(report, "k_shot"))


def _plain(k_shot: Mapping[str, Any]) -> dict[str, Any]:
    return {
        stage: {shots: {"accuracy": one} for shots, one in section(k_shot, stage).items()}
        for stage in k_shot
        if section(k_shot, stage)
    }


def other_tasks(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The tasks that weren't trained, each with its results as in `details_of`."""
    found = [
        (text(one, "task", "unnamed"), section(one, "details") or _plain(section(one, "k_shot")))
        for one in entries(report, "forgetting")
    ]
    return [(name, details) for name, details in found if details]


def accuracy_of(details: Mapping[str, Any], stage: str, shots: str) -> Accuracy | None:
    """The accuracy of a stage with so many demonstrations; the interval is Wilson's where the report has none."""
    result = section(section(details, stage), shots)
    share = number(result, "accuracy")
    if share is None or not 0 <= share <= 1:
        return None
    items = count(result, "items")
    if (known := pair(result, "interval")) is not None and known[0] < known[1]:
        return Accuracy(share, *known)
    return Accuracy(share, *wilson_interval(share * items, items)) if items > 0 else Accuracy(share, 0.0, 1.0)


def shots_of(details: Mapping[str, Any]) -> list[str]:
    """The numbers of demonstrations that any stage has, in rising order."""
    found = {shots for stage in details for shots in section(details, stage) if str(shots).isdecimal()}
    return sorted(found, key=int)


def items_of(details: Mapping[str, Any]) -> int:
    """On how many items the figures are; 0 where that isn't known."""
    return max((count(result, "items") for _, _, result in each(details)), default=0)


def each(details: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Stage, shots and result, one after the other."""
    for stage in details:
        for shots in shots_of({stage: section(details, stage)}):
            yield stage, shots, section(section(details, stage), shots)


def accuracy_table(details: Mapping[str, Any]) -> Markdown:
    """Accuracies by shots (rows) and stage (columns), with what has to be read beside them."""
    stages = [stage for stage in details if shots_of({stage: section(details, stage)})]
    rows = []
    for shots in shots_of(details):
        results = [section(section(details, stage), shots) for stage in stages]
        cells = [accuracy_of(details, stage, shots) for stage in stages]
        constants = [one for one in (number(result, "most_frequent_share") for result in results) if one is not None]
        given = " / ".join(str(count(result, "distinct_answers")) if result else "-" for result in results)
        constant = f"{constants[0]:.1%}" if constants else "-"
        rows.append((shots, *(str(cell) if cell else "-" for cell in cells), constant, given))
    heads = ("shots", *(STAGES.get(stage, stage) for stage in stages))
    return table((*heads, "most frequent answer, always", "distinct answers given"), rows)


def verdicts(details: Mapping[str, Any]) -> list[str]:
    """What has to be read with the figures: answers that mean nothing, answers that were cut."""
    lines = []
    for stage, shots, result in each(details):
        where = f"{STAGES.get(stage, stage)}, {shots}-shot"
        if verdict := text(result, "verdict"):
            lines.append(f"{where}: {verdict}")
        if cut := count(result, "cut"):
            lines.append(f"{where}: {cut} of {count(result, 'items')} answers were cut at the limit of tokens")
    return lines


def accuracy_section(details: Mapping[str, Any]) -> Markdown:
    """The table and the remarks below it."""
    remarks = bullets(verdicts(details))
    return Markdown(f"{accuracy_table(details)}\n\n{remarks}" if remarks else accuracy_table(details))
