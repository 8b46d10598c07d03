"""The figures of a report: accuracies by shots, fidelity to the teacher and calibration, as tables and as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hfkd.card.markdown import Markdown, bullets, code_cell, table
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
    if (known := pair(result, "interval")) is not None:
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


# What is shown of a fidelity report: the words, the key, the key of its interval, and whether it is a share.
_AGAINST_TEACHER = (
    ("same likeliest token", "agreement", "agreement_interval", True),
    ("the same where the teacher is wrong", "agreement_when_teacher_wrong", "", True),
    ("KL(teacher to student), nats per token", "forward_kl", "forward_kl_interval", False),
    ("KL(student to teacher), nats per token", "reverse_kl", "reverse_kl_interval", False),
    ("mass on the teacher's {k} likeliest tokens", "captured_mass.student", "", True),
    ("entropy less the teacher's, nats", "entropy.gap", "", False),
)
_OF_THE_TEXT = (
    ("likeliest token is the text's", "accuracy", True),
    ("perplexity of the text", "perplexity", False),
    ("expected calibration error", "expected_calibration_error", True),
    ("Brier score (0 to 2)", "brier", False),
)


def fidelity_table(report: Mapping[str, Any]) -> Markdown:
    """Student before and after beside its teacher, token by token on held-out text."""
    stages = {stage: one for stage in ("before", "after") if (one := section(report, f"fidelity.{stage}"))}
    if not stages:
        return Markdown("")
    last = list(stages.values())[-1]
    rows = []
    for words, key, interval, share in _AGAINST_TEACHER:
        cells = [
            _figure(number(one, key), pair(one, interval) if interval else None, share) for one in stages.values()
        ]
        own = _figure(number(last, "captured_mass.teacher"), None, True) if key.startswith("captured") else "-"
        rows.append((words.format(k=count(last, "captured_mass.k")), *cells, own))
    for words, key, share in _OF_THE_TEXT:
        cells = [_figure(number(one, f"student.{key}"), None, share) for one in stages.values()]
        rows.append((words, *cells, _figure(number(last, f"teacher.{key}"), None, share)))
    return table(("", *(f"student {stage}" for stage in stages), "teacher"), rows)


def _figure(one: float | None, interval: tuple[float, float] | None, share: bool) -> str:
    if one is None:
        return "-"
    words = f"{one:.1%}" if share else f"{one:.4g}"
    if interval is None:
        return words
    low, high = interval
    return f"{words} ({100 * low:.1f} to {100 * high:.1f})" if share else f"{words} ({low:.4g} to {high:.4g})"


def worst_tokens(report: Mapping[str, Any], most: int = 5) -> Markdown:
    """The tokens on which the student is farthest from its teacher after training."""
    rows = [
        (code_cell(repr(text_of(one, "text"))), count(one, "tokens"), _figure(number(one, "forward_kl"), None, False))
        + (code_cell(repr(text_of(one, "teacher"))), code_cell(repr(text_of(one, "student"))))
        for one in entries(report, "fidelity.after.worst_tokens")[:most]
    ]
    heads = ("token of the text", "times", "mean KL, nats", "the teacher's likeliest", "the student's likeliest")
    return table(heads, rows)


def text_of(one: Mapping[str, Any], key: str) -> str:
    """A text that may be blank, as a token may be."""
    found = one.get(key)
    return found if isinstance(found, str) else ""
