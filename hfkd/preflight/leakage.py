"""Does a prompt of one part stand in another one: demonstrations, training rows, evaluation items?

Prompts are compared as words, without case and the punctuation of sentences, and by the runs of words that they share:
a question with one word changed is the same question. It says where they meet; what is left out of training is said
elsewhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfkd.data.messages import Row, prompt_key
from hfkd.preflight.findings import Finding

_NAME = "leakage"
_WORD = re.compile(r"[^\s.,;:!?…\"'()\[\]]+")  # signs such as + and - tell one question from another
_RUN = 4  # words
_ALIKE = 0.6
_COMMON = 0.02  # a run of words in more of the prompts than this belongs to the form of the question
_FEWEST = 4  # runs of words that two prompts must have beyond their form, to be compared by them
_QUOTE = 80


@dataclass(frozen=True)
class Match:
    """Two prompts that are alike.

    Args:
        row: The number of the first one in its part.
        other: The number of the second one in its part.
        alike: The share of their runs of words that both have, 1 where all words are the same.
    """

    row: int
    other: int
    alike: float


def meetings(first: Sequence[str], second: Sequence[str]) -> list[Match]:
    """Find the prompts of one part that stand in another, word for word or nearly.

    Args:
        first: Prompts.
        second: Prompts to compare them with, each with each; the fewer part, for speed.

    Returns:
        For each of `first` that has one, its nearest in `second`.
    """
    ours, theirs = [_words(text) for text in first], [_words(text) for text in second]
    whole = {words: number for number, words in reversed(list(enumerate(theirs)))}
    form = _form([*ours, *theirs])
    known: dict[str, list[int]] = {}
    sizes = []
    for number, words in enumerate(theirs):
        runs = _runs(words) - form
        sizes.append(len(runs))
        for run in runs:
            known.setdefault(run, []).append(number)
    found = []
    for number, words in enumerate(ours):
        if words in whole:
            found.append(Match(number, whole[words], 1.0))
        elif (match := _nearest(number, _runs(words) - form, known, sizes)) is not None:
            found.append(match)
    return found


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold())) or text.strip()


def _runs(words: str) -> set[str]:
    parts = words.split()
    return {" ".join(parts[place : place + _RUN]) for place in range(len(parts) - _RUN + 1)}


def _form(prompts: Sequence[str]) -> set[str]:
    """The runs of words that so many prompts have that they say nothing of one."""
    different = set(prompts)
    counts = Counter(run for words in different for run in _runs(words))
    most = max(5, int(_COMMON * len(different)))
    return {run for run, count in counts.items() if count > most}


def _nearest(number: int, runs: set[str], known: Mapping[str, list[int]], sizes: Sequence[int]) -> Match | None:
    if len(runs) < _FEWEST:
        return None
    shared = Counter(other for run in runs for other in known.get(run, ()))
    alike = {
        other: count / (len(runs) + sizes[other] - count) for other, count in shared.items() if sizes[other] >= _FEWEST
    }
    best = max(alike, key=alike.get, default=None)
    return Match(number, best, alike[best]) if best is not None and alike[best] >= _ALIKE else None


def find_leaks(
    train: Sequence[Row],
    demonstrations: Sequence[Row],
    evaluation: Sequence[Row],
    allowed: int = 0,
    key: Callable[[Row], str] = prompt_key,
) -> Iterator[Finding]:
    """Compare the parts of a run with each other.

    Args:
        train: Training rows.
        demonstrations: What the prompts show; each row's own demonstrations are looked at besides.
        evaluation: Held-out items.
        allowed: Training rows that are known to be demonstrations and are left out already.
        key: What of a row is compared: its prompt, or the whole text of a passage.
    """
    shown, asked, learned = ([key(row) for row in rows] for rows in (demonstrations, evaluation, train))
    found = [
        *_report("demonstrations", shown, "evaluation items", asked, "the answer would stand in the prompt", "error"),
        *_own_demonstrations(train, asked),
        *_report("evaluation items", asked, "training rows", learned, "what is held out would be learned", "error"),
        *_shown_in_training(shown, learned, allowed),
    ]
    yield from found
    if found:
        return
    counts = {"train": len(train), "demonstrations": len(shown), "evaluation": len(asked)}
    words = f"{len(train)} training rows, {len(shown)} demonstrations and {len(asked)} evaluation items"
    yield Finding("pass", _NAME, f"{words} have no prompt in common, nor nearly.", counts)


def _report(
    name: str, first: Sequence[str], other: str, second: Sequence[str], why: str, level: str
) -> Iterator[Finding]:
    """One comparison: prompts that are the same in one finding, those that are nearly so in another."""
    if not first or not second:
        return
    matches = meetings(first, second) if len(second) <= len(first) else _turned(meetings(second, first))
    same = [match for match in matches if match.alike == 1.0]
    near = [match for match in matches if match.alike < 1.0]
    if same:
        text = f"{_count(same)} of the {name} stand among the {other} ({_example(same[0], first, second)}): {why}."
        yield Finding(level, _NAME, f"{text} Take them out of one of the two.", _figures(name, other, same, "same"))
    if near:
        best = max(near, key=lambda match: match.alike)
        text = (
            f"{_count(near)} of the {name} are nearly the same as some of the {other}, by {best.alike:.0%} in the "
            f"nearest pair ({_example(best, first, second)}): {why}. Look whether they are the same question."
        )
        yield Finding("warning", _NAME, text, _figures(name, other, near, "near"))


def _turned(matches: Sequence[Match]) -> list[Match]:
    """Matches seen from the other side, the nearest of each."""
    best: dict[int, Match] = {}
    for match in matches:
        if match.other not in best or match.alike > best[match.other].alike:
            best[match.other] = Match(match.other, match.row, match.alike)
    return [best[number] for number in sorted(best)]


def _own_demonstrations(train: Sequence[Row], asked: Sequence[str]) -> Iterator[Finding]:
    """The demonstrations that rows bring with them, which the teacher reads."""
    own = {prompt_key(shown): None for row in train for shown in row.get("demonstrations") or ()}
    if own:
        why = "the student would learn from a teacher that read the held-out answer"
        yield from _report("rows' own demonstrations", list(own), "evaluation items", asked, why, "error")


def _shown_in_training(shown: Sequence[str], learned: Sequence[str], allowed: int) -> Iterator[Finding]:
    """Demonstrations among the training rows: the teacher would copy what it was just shown."""
    why = "the teacher copies an answer that it was just shown"
    for finding in _report("demonstrations", shown, "training rows", learned, why, "warning"):
        if allowed and finding.figures["kind"] == "same":
            left_out = f"{allowed} training row{'' if allowed == 1 else 's'} of the same prompt are left out."
            finding = Finding("warning", _NAME, f"{finding.message} {left_out}", finding.figures)
        yield finding


def _count(matches: Sequence[Match]) -> int:
    return len({match.row for match in matches})


def _example(match: Match, first: Sequence[str], second: Sequence[str]) -> str:
    ours, theirs = _quote(first[match.row]), _quote(second[match.other])
    return f"number {match.row} and {match.other}, {ours}" + ("" if ours == theirs else f" and {theirs}")


def _quote(text: str) -> str:
    return repr(text if len(text) <= _QUOTE else text[: _QUOTE - 3] + "...")


def _figures(name: str, other: str, matches: Sequence[Match], kind: str) -> dict[str, Any]:
    pairs = [[match.row, match.other, round(match.alike, 3)] for match in matches[:20]]
    return {"part": name, "other": other, "kind": kind, "count": _count(matches), "pairs": pairs}
