"""What speaks against a model, computed from its own record: a reader should find it here before anywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hfkd.card.reading import count, number, section, text, value
from hfkd.card.results import accuracy_of, details_of, each, items_of, other_tasks, shots_of

_FEW = 200
"""Below so many items an interval is so wide that the card says so."""


def limits(run: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """One line for each weakness that the record shows, and for what nobody looked at."""
    details = details_of(report)
    return [
        *_run(run),
        *_measuring(details),
        *_against_baselines(details),
        *_teacher(run, details),
        *_answers(run),
        *_left_out(run),
        *_fidelity(report),
        *_forgetting(report),
    ]


def _run(run: Mapping[str, Any]) -> Iterator[str]:
    seed = value(run, "recipe.training.seed")
    named = f" ({seed})" if isinstance(seed, int) else ""
    yield (
        f"One run with one seed{named}; the intervals say how far the choice of items alone could move a figure, not "
        "how far another seed would."
    )
    status = text(run, "status")
    if status and status not in ("finished", "started"):
        yield f"The run did not end as it should: its record says '{status}'."


def _measuring(details: Mapping[str, Any]) -> Iterator[str]:
    items = items_of(details)
    if not details:
        yield "Nothing was evaluated in this run, so nothing is known of what the model can do."
        return
    if 0 < items < _FEW:
        found = [accuracy_of(details, stage, shots) for stage, shots, _ in each(details)]
        widest = max((one.high - one.low for one in found if one), default=0.0)
        yield f"{items} items are few: the widest interval of an accuracy spans {100 * widest:.0f} points."
    if any(text(result, "verdict") for _, _, result in each(details)):
        yield "Some figures are no better than a constant answer; see the remarks below the table."
    if any(count(result, "cut") for _, _, result in each(details)):
        yield "Some answers were cut at the limit of tokens and may count as wrong for that alone."


def _against_baselines(details: Mapping[str, Any]) -> Iterator[str]:
    """Where the gain is within the noise, or something simpler does as well."""
    for shots in shots_of(details):
        after, before, gold = (accuracy_of(details, stage, shots) for stage in ("after", "before", "gold"))
        if after is None:
            continue
        if before is not None and after.low <= before.high and before.low <= after.high:
            way = "fell" if after.share < before.share else "rose" if after.share > before.share else "stayed"
            yield (
                f"With {_shown(shots)} the accuracy {way} from {before.share:.1%} to {after.share:.1%}, and the two "
                "intervals overlap: taken by themselves they show no change."
            )
        elif before is not None and after.share < before.share:
            yield f"With {_shown(shots)} it became worse: {before.share:.1%} before, {after.share:.1%} after."
        if gold is not None and gold.share >= after.share:
            yield (
                f"With {_shown(shots)} fine-tuning on the gold answers, at the same budget, scores {gold.share:.1%} "
                f"against {after.share:.1%}: with labels at hand the teacher brought nothing there."
            )


def _teacher(run: Mapping[str, Any], details: Mapping[str, Any]) -> Iterator[str]:
    kind = text(run, "recipe.teacher.kind")
    if kind == "none" or not kind:
        return
    yield (
        "The student learned what the teacher says, right or wrong; it is not expected to be better than the teacher."
    )
    stage, shots = teacher_figure(run, details)
    if not stage:
        yield "How good the teacher is at this task itself was not measured."
    elif verdict := text(section(section(details, stage), shots), "verdict"):
        yield f"The teacher itself is not better than a constant answer with {_shown(shots)}: {verdict}."


def teacher_figure(run: Mapping[str, Any], details: Mapping[str, Any]) -> tuple[str, str]:
    """The stage and the shots of the teacher's own accuracy; empty words where it wasn't measured. A self-teacher that
    stays as it was is the student before training, with the demonstrations that it reads.
    """
    shots = str(count(run, "recipe.data.demonstrations.count"))
    teachers = shots_of({"teacher": section(details, "teacher")})
    if teachers:
        return "teacher", shots if shots in teachers else teachers[-1]
    teacher = section(run, "recipe.teacher")
    frozen = text(teacher, "kind") == "self" and text(teacher, "weights") != "live"
    return ("before", shots) if frozen and accuracy_of(details, "before", shots) else ("", "")


def _answers(run: Mapping[str, Any]) -> Iterator[str]:
    answer = value(run, "recipe.data.answer")
    if answer == "teacher":
        yield "The training answers were written by the teacher and were not checked."
    elif answer not in ("dataset", None):
        yield "Training answers that a model wrote were not checked."


def _left_out(run: Mapping[str, Any]) -> Iterator[str]:
    examples, empty = section(run, "data.training_examples"), count(run, "data.teacher_answers.empty")
    too_long = count(examples, "too_long") + count(examples, "too_long_once_answered")
    if too_long or empty:
        yield (
            f"Left out of training: {too_long} examples that were too long, {empty} that the teacher gave no answer "
            "to."
        )
    if (rows := count(run, "data.train.rows")) and rows < 1000:
        yield f"It was trained on {rows} rows of one task; other wordings of that task were not tried."


def _fidelity(report: Mapping[str, Any]) -> Iterator[str]:
    before, after = section(report, "fidelity.before"), section(report, "fidelity.after")
    if not after:
        why = text(report, "fidelity.unavailable")
        yield f"How close the student is to its teacher, token by token, was not measured{f': {why}' if why else ''}."
        return
    if (agreement := number(after, "agreement")) is not None:
        yield (
            f"On {1 - agreement:.1%} of the held-out tokens its likeliest token is another than the teacher's: it is "
            "not its teacher."
        )
    wrong, of = number(after, "agreement_when_teacher_wrong"), count(after, "teacher_wrong")
    if wrong and of:
        yield f"Where the teacher is wrong ({of} tokens), it makes the same mistake {wrong:.1%} of the time."
    for key, words in (
        ("forward_kl", "KL to its teacher"),
        ("student.expected_calibration_error", "calibration error"),
    ):
        then, now = number(before, key), number(after, key)
        if then is not None and now is not None and now > then:
            yield f"Its {words} is worse than before training: {then:.4g} before, {now:.4g} after."


def _forgetting(report: Mapping[str, Any]) -> Iterator[str]:
    tasks = other_tasks(report)
    if not tasks:
        yield "What the model forgot of other tasks was not measured."
    for name, details in tasks:
        falls = {}
        for shots in shots_of(details):
            before, after = accuracy_of(details, "before", shots), accuracy_of(details, "after", shots)
            if before and after and after.share < before.share:
                falls[shots] = before.share - after.share
        if falls:
            worst = max(falls, key=lambda shots: falls[shots])
            yield f"On {name} it lost {falls[worst]:.1%} of the items with {_shown(worst)} in the prompt."


def _shown(shots: str) -> str:
    return f"{shots} demonstration{'' if shots == '1' else 's'}"
