"""What speaks against a model, computed from its own record: a reader should find it here before anywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hfkd.card.course import ending
from hfkd.card.differences import against_before, against_forgetting, against_gold
from hfkd.card.fidelity import interval_of
from hfkd.card.methods import hides
from hfkd.card.objective import terms_of
from hfkd.card.reading import count, number, section, text, value
from hfkd.card.results import accuracy_of, details_of, each, items_of, other_tasks, shots_of
from hfkd.card.teaching import demonstrations, moves, moving_words

_FEW = 200
"""Below so many items an interval is so wide that the card says so."""
_ERROR = "expected_calibration_error"
_HEEDING = ("swing", "cross_entropy", "adaptive_label_smoothing", "embedding_neighbours")
"""The losses that learn less of a token that is marked as private."""


def limits(run: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """One line for each weakness that the record shows, and for what nobody looked at."""
    details = details_of(report)
    return [
        *_run(run),
        *_measuring(report, details),
        *against_before(report, details),
        *against_gold(report, details),
        *_teacher(run, details),
        *_answers(run),
        *_left_out(run),
        *_privacy(run),
        *_fidelity(run, report),
        *_forgetting(report),
    ]


def _run(run: Mapping[str, Any]) -> Iterator[str]:
    if words := ending(run):
        yield words
    seed = value(run, "recipe.training.seed")
    named = f" ({seed})" if isinstance(seed, int) else ""
    yield (
        f"One run with one seed{named}; the intervals say how far the choice of items alone could move a figure, not "
        "how far another seed would."
    )


def _measuring(report: Mapping[str, Any], details: Mapping[str, Any]) -> Iterator[str]:
    items = items_of(details)
    if not details:
        measured = "No question was asked" if section(report, "fidelity.after") else "Nothing was evaluated"
        yield f"{measured} in this run, so it isn't known how many answers the model gets right."
        return
    if 0 < items < _FEW:
        found = [accuracy_of(details, stage, shots) for stage, shots, _ in each(details)]
        widest = max((one.high - one.low for one in found if one), default=0.0)
        yield f"{items} items are few: the widest interval of an accuracy spans {100 * widest:.0f} points."
    if any(text(result, "verdict") for _, _, result in each(details)):
        yield "Some figures are no better than a constant answer; see the remarks below the table."
    if any(count(result, "cut") for _, _, result in each(details)):
        yield "Some answers were cut at the limit of tokens and may count as wrong for that alone."


def _privacy(run: Mapping[str, Any]) -> Iterator[str]:
    if not hides(run):
        return
    kinds = list(dict.fromkeys(text(term, "kind", "unknown") for term in terms_of(run)))
    heeding = [kind for kind in kinds if kind in _HEEDING]
    blind = [kind for kind in kinds if kind not in _HEEDING]
    if heeding:
        yield (
            f"Of tokens that a scorer found private less was learned by {', '.join(heeding)}. This is no guarantee of "
            "privacy: what the scorer didn't find was learned like everything else."
        )
    else:
        yield "Tokens were marked as private. This is no guarantee of privacy, and no known term learned less of them."
    if blind:
        yield f"Private tokens were learned like all others, as far as is known, by {', '.join(blind)}."


def _teacher(run: Mapping[str, Any], details: Mapping[str, Any]) -> Iterator[str]:
    kind = text(run, "recipe.teacher.kind")
    if kind == "none" or not kind:
        return
    if not section(run, "recipe.reinforcement"):
        yield (
            "The student learned what the teacher says, right or wrong; it is not expected to be better than the "
            "teacher."
        )
    stage, shots = teacher_figure(run, details)
    if not stage:
        yield "How good the teacher is at this task itself was not measured."
    elif verdict := text(section(section(details, stage), shots), "verdict"):
        yield f"The teacher itself is not better than a constant answer with {demonstrations(shots)}: {verdict}."


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
        yield f"It was trained on {rows} rows of one source; wordings and tasks that are unlike them were not tried."


def _fidelity(run: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[str]:
    before, after = section(report, "fidelity.before"), section(report, "fidelity.after")
    if not after:
        why = text(report, "fidelity.unavailable")
        yield f"How close the student is to its teacher, token by token, was not measured{f': {why}' if why else ''}."
        return
    if words := moving_words(run, report):
        yield words
    agreement = number(after, "agreement")
    if agreement is not None and agreement < 1:
        yield (
            f"On {1 - agreement:.1%} of the held-out tokens its likeliest token is another than the teacher's: it is "
            "not its teacher."
        )
    wrong, of = number(after, "agreement_when_teacher_wrong"), count(after, "teacher_wrong")
    if wrong and of:
        yield f"Of {of} tokens on which the teacher is wrong it says the same wrong one on {round(wrong * of)}."
    if not moves(run, report):
        yield from _risen(before, after, "forward_kl", "KL to its teacher")
    yield from _risen(before, after, f"student.{_ERROR}", "expected calibration error")


def _risen(before: Mapping[str, Any], after: Mapping[str, Any], key: str, words: str) -> Iterator[str]:
    """What is larger than before training, and whether that is more than the choice of texts makes of it."""
    then, now = number(before, key), number(after, key)
    if then is None or now is None or now <= then:
        return
    ends = [interval_of(figures, f"{key}_interval") for figures in (before, after)]
    if None in ends:
        so = "without an interval, that may be chance"
    else:
        so = "beyond their intervals" if ends[1][0] > ends[0][1] else "and the two intervals overlap"
    yield f"Its {words} is larger than before training, {so}: {then:.4g} before, {now:.4g} after."


def _forgetting(report: Mapping[str, Any]) -> Iterator[str]:
    tasks = other_tasks(report)
    if not tasks:
        yield "What the model forgot of other tasks was not measured."
    for name, details in tasks:
        yield from against_forgetting(report, name, details)
