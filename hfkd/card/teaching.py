"""Who taught, what teacher and student read, and whether the teacher stayed the same, in words.

A teacher often knows more only because it reads more, so what each of them read stands wherever the two are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfkd.card.markdown import Markdown, code, plain
from hfkd.card.reading import count, number, section, text, value

WEIGHTS = {
    "adapter_off": "the student's own weights with the adapter switched off",
    "frozen_copy": "a frozen copy of the student as it was before training",
    "live": "the student's own weights as they were at each step",
}
_MOVED = 0.01  # a teacher whose perplexity of the same texts changed by more than this share is another one


def teacher_words(run: Mapping[str, Any]) -> Markdown:
    """Who the teacher was, and what it read."""
    teacher = section(run, "recipe.teacher")
    kind = text(teacher, "kind")
    if not kind:
        return Markdown("Who the teacher was isn't recorded.")
    if kind == "none":
        whose = "a reward" if section(run, "recipe.reinforcement") else "the answers"
        return Markdown(f"There was no teacher: the student learned from {whose} alone.")
    cached = ", read from a cache of what it says" if teacher.get("cache") else ""
    plural = kind in ("mixture", "routed")
    begins = f"The teachers are {_whose(teacher)}; they" if plural else f"The teacher is {_whose(teacher)}{cached}; it"
    return Markdown(f"{begins} read {plain(teacher_read(run))}.")


def _whose(teacher: Mapping[str, Any]) -> Markdown:
    """Whose weights teach."""
    kind = text(teacher, "kind", "unknown")
    if members := section(teacher, "members"):
        named = ", ".join(f"{plain(name)} ({_whose(section(members, name))})" for name in members)
        how = "by the column of each row" if kind == "routed" else "mixed by their weights"
        return Markdown(f"{named}, {how}")
    if kind == "self":
        return plain(WEIGHTS.get(text(teacher, "weights"), "the student itself"))
    if kind == "ema":
        interval = count(teacher, "interval", 1)
        often = "step" if interval == 1 else f"{interval} steps"
        decay = number(teacher, "decay")
        return plain(f"a moving average of the student's weights (decay {decay} every {often})")
    if kind == "snapshot":
        every = value(teacher, "every")
        when = "at the end of the epoch before" if every == "epoch" else f"up to {every} steps before"
        return plain(f"the student as it was {when}")
    if kind == "early_exit":
        return plain("the student itself, as if it ended at a lower layer")
    revision = text(teacher, "revision")
    return Markdown(code(text(teacher, "model") or kind) + (f" at revision {code(revision)}" if revision else ""))


def teacher_read(run: Mapping[str, Any]) -> str:
    """What the teacher had before it, as the rest of "it read ..."."""
    before = "before each text" if section(run, "recipe.data").get("whole_text") is True else "before each question"
    if more := _more(run):
        return f"{more} {before}"
    if _told(run) == 0 and not _student_shown(run):
        return "the same prompts as the student"
    unknown = "" if _told(run) == 0 else "; whether rows brought a context of their own for it isn't recorded"
    return f"no demonstrations{unknown}"


def _more(run: Mapping[str, Any]) -> str:
    """What the teacher is known to have read besides the question; empty where that is nothing."""
    shown, told, rows = count(run, "recipe.data.demonstrations.count"), _told(run), count(run, "data.train.rows")
    parts = [demonstrations(shown)] if shown else []
    if told is None and _maps_context(run):
        parts.append("the row's own context")
    elif told:
        parts.append("the row's own context" + (f" (in {told} of {rows} rows)" if told < rows else ""))
    return " and ".join(parts)


def _told(run: Mapping[str, Any]) -> int | None:
    """How many training rows bring a context that the teacher alone reads; None where nobody counted. Whole texts are
    learned by students that read what the teacher reads.
    """
    if section(run, "recipe.data").get("whole_text") is True:
        return 0
    found = number(run, "data.privileged_context.rows")
    return found if isinstance(found, int) else None


def _maps_context(run: Mapping[str, Any]) -> bool:
    return bool(text(run, "recipe.data.train.columns.privileged_context"))


def _student_shown(run: Mapping[str, Any]) -> list[int]:
    """The numbers of demonstrations that the student read, without 0."""
    shots = value(run, "recipe.data.student_shots")
    return [one for one in shots if isinstance(one, int) and one > 0] if isinstance(shots, list) else []


def shots_words(run: Mapping[str, Any]) -> str:
    """What the student read."""
    shots = value(run, "recipe.data.student_shots")
    if not isinstance(shots, list) or not shots:
        return ""
    drawn = ", drawn anew at each visit of an example" if len(shots) > 1 else ""
    return f"The student read {' or '.join(map(str, shots))} demonstration{'' if shots == [1] else 's'}{drawn}."


def prompts_words(run: Mapping[str, Any]) -> str:
    """What stood before the tokens that both predict: the figures are as much of prompts as of models."""
    if not section(run, "recipe.data"):
        return "What each of the two read before them isn't recorded."
    told, students = _told(run), _student_shown(run)
    if not (more := _more(run)) and not students:
        if told == 0:
            return "Both read the same text before each token."
        return (
            "Neither reads demonstrations before them; whether the teacher reads a context of the row's own isn't "
            "recorded."
        )
    shots = value(run, "recipe.data.student_shots")
    shots = shots if isinstance(shots, list) and shots else [0]
    drawn = ", drawn for each text" if len(shots) > 1 else ""
    reads = " or ".join(map(str, shots)) + (f" demonstration{'' if shots == [1] else 's'}")
    return (
        f"Both predict the same answers, each after a prompt of its own: the teacher reads {more or 'nothing more'}, "
        f"the student {reads}{drawn}. So the figures are of models and prompts together."
    )


def demonstrations(shown: int | str) -> str:
    """A number of demonstrations in words."""
    return f"{shown} demonstration{'' if str(shown) == '1' else 's'}"


def moves(run: Mapping[str, Any], report: Mapping[str, Any]) -> bool:
    """Whether the teacher of `after` has other weights than that of `before`."""
    teacher = section(run, "recipe.teacher")
    members = section(teacher, "members")
    if any(_moving(one) for one in [teacher, *(section(members, name) for name in members)]):
        return True
    then, now = (number(report, f"fidelity.{stage}.teacher.perplexity") for stage in ("before", "after"))
    return then is not None and now is not None and abs(now - then) > _MOVED * abs(then)


def _moving(teacher: Mapping[str, Any]) -> bool:
    return text(teacher, "kind") in ("ema", "snapshot") or _is_live(teacher)


def _is_live(teacher: Mapping[str, Any]) -> bool:
    return text(teacher, "kind") in ("self", "early_exit") and text(teacher, "weights") == "live"


def moving_words(run: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """What follows from a teacher that moved; empty for one that stayed."""
    if not moves(run, report):
        return ""
    words = "The teacher moved: before and after are held against different weights, and can't be compared."
    if _is_live(section(run, "recipe.teacher")):
        words += (
            " It is the student itself with more to read, so the figures say what reading more is worth to it, not "
            "how near it came to another model."
        )
    return words
