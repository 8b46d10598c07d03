"""How near a student is to its teacher, as a table and as what has to be read with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfkd.card.markdown import Markdown, code_cell, table
from hfkd.card.reading import count, entries, number, pair, section, text
from hfkd.card.teaching import moves, moving_words, prompts_words

_FEW_TEXTS = 10
"""Below so many texts a figure has no interval."""
# What is shown: the words, the key, the key of its interval, that of the teacher's own, and whether it is a share.
_ERROR = "expected_calibration_error"
_ROWS = (
    ("same likeliest token", "agreement", "agreement_interval", "", True),
    ("the same where the teacher is wrong ({wrong} tokens)", "agreement_when_teacher_wrong", "", "", True),
    ("KL(teacher to student), nats per token", "forward_kl", "forward_kl_interval", "", False),
    ("KL(student to teacher), nats per token", "reverse_kl", "reverse_kl_interval", "", False),
    ("mass on the teacher's {k} likeliest tokens", "captured_mass.student", "", "captured_mass.teacher", True),
    ("entropy, nats per token", "entropy.student", "", "entropy.teacher", False),
    ("likeliest token is the text's", "student.accuracy", "", "teacher.accuracy", True),
    ("perplexity of the text", "student.perplexity", "", "teacher.perplexity", False),
    ("expected calibration error", f"student.{_ERROR}", "", f"teacher.{_ERROR}", True),
    ("Brier score (0 to 2)", "student.brier", "", "teacher.brier", False),
)
_WITH_INTERVALS = {"agreement_interval": "agreement", "forward_kl_interval": "KL", "reverse_kl_interval": "reverse KL"}


def stages_of(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The figures by stage, before training and after it."""
    return {stage: one for stage in ("before", "after") if (one := section(report, f"fidelity.{stage}"))}


def columns_of(run: Mapping[str, Any], report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str]]:
    """Heading, figures and side (`student` or `teacher`) of each column: one for a teacher that stayed as it was, one
    for each stage of a teacher that moved.
    """
    stages, moved = stages_of(report), moves(run, report)
    columns = []
    for stage, figures in stages.items():
        columns.append((f"student {stage}", figures, "student"))
        columns += [(f"teacher {stage}", figures, "teacher")] if moved else []
    return columns if moved or not stages else [*columns, ("teacher", list(stages.values())[-1], "teacher")]


def interval_of(figures: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The 95 % interval of a figure, unless it promises what it can't: a bootstrap over a handful of texts is too
    narrow, and one without a width would say that there is no doubt at all.
    """
    ends = pair(figures, key) if key else None
    return ends if ends and count(figures, "texts") >= _FEW_TEXTS and ends[0] < ends[1] else None


def fidelity_words(run: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """On what it was measured, and what stood before the tokens."""
    last = list(stages_of(report).values())[-1:] or [{}]
    return (
        f"Token by token on {count(last[0], 'texts')} held-out texts ({count(last[0], 'tokens')} tokens), at "
        f"temperature 1. {prompts_words(run)}"
    )


def fidelity_table(run: Mapping[str, Any], report: Mapping[str, Any]) -> Markdown:
    """Student and teacher side by side, token by token on held-out text."""
    columns = columns_of(run, report)
    if not columns:
        return Markdown("")
    last, rows = columns[-1][1], []
    for words, key, interval, teachers, share in _ROWS:
        cells = [
            _figure(number(figures, key), interval_of(figures, interval), share)
            if side == "student"
            else _figure(number(figures, teachers) if teachers else None, None, share)
            for _, figures, side in columns
        ]
        named = words.format(k=count(last, "captured_mass.k"), wrong=count(last, "teacher_wrong"))
        rows.append((named, *cells))
    return table(("", *(heading for heading, _, _ in columns)), rows)


def _figure(one: float | None, interval: tuple[float, float] | None, share: bool) -> str:
    if one is None:
        return "-"
    words = f"{one:.1%}" if share else f"{one:.4g}"
    if interval is None:
        return words
    low, high = interval
    return f"{words} ({100 * low:.1f} to {100 * high:.1f})" if share else f"{words} ({low:.4g} to {high:.4g})"


def fidelity_remarks(run: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """What has to be read with the figures: a teacher that moved, intervals that there are none of, and what the
    measurement itself remarked.
    """
    stages = stages_of(report)
    if not stages:
        return []
    lines = [words] if (words := moving_words(run, report)) else []
    lines += _without_intervals(stages)
    notes = [one for figures in stages.values() for one in _notes(figures)]
    supports = [text(figures, "support", "vocabulary") for figures in stages.values()]
    notes += [
        f"Divergences and entropies are taken on {one}, and not on the whole vocabulary."
        for one in supports
        if one != "vocabulary" and not any(one in note for note in notes)
    ]
    return list(dict.fromkeys([*lines, *notes]))


def _without_intervals(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for stage, figures in stages.items():
        if 0 < (texts := count(figures, "texts")) < _FEW_TEXTS:
            lines.append(f"{texts} texts are too few for intervals: another choice of texts may give other figures.")
            continue
        same = [
            name for key, name in _WITH_INTERVALS.items() if (ends := pair(figures, key)) and not ends[0] < ends[1]
        ]
        if same:
            lines.append(
                f"Student {stage}: no interval for {', '.join(same)}, since all texts gave the same; that isn't "
                "certainty."
            )
    return lines


def _notes(figures: Mapping[str, Any]) -> list[str]:
    found = figures.get("notes")
    return [one for one in found if isinstance(one, str) and one.strip()] if isinstance(found, list) else []


def worst_tokens(report: Mapping[str, Any], most: int = 5) -> Markdown:
    """The tokens of the texts that make up most of the divergence after training."""
    rows = [
        (
            code_cell(repr(_token(one, "text"))),
            count(one, "tokens"),
            _figure(number(one, "forward_kl"), None, False),
            _figure(number(one, "total"), None, False),
            code_cell(repr(_token(one, "teacher"))),
            code_cell(repr(_token(one, "student"))),
        )
        for one in entries(report, "fidelity.after.worst_tokens")[:most]
    ]
    heads = ("token of the text", "times", "mean KL, nats", "total KL, nats")
    return table((*heads, "the teacher's likeliest", "the student's likeliest"), rows)


def _token(one: Mapping[str, Any], key: str) -> str:
    """A text that may be blank, as a token may be."""
    found = one.get(key)
    return found if isinstance(found, str) else ""
