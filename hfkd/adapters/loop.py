"""Two ways to an answer, asked until they agree: by intuition, and by knowledge written first.

It knows texts and answers alone: no model, no adapter. Who writes is handed in.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from hfkd.eval.answers import EXTRACTORS, match
from hfkd.intervals import wilson_interval

logger = logging.getLogger(__name__)

Writes = Callable[[Sequence[str], int], Sequence[str]]
"""`(questions, round) -> texts`, one text for each question; rounds are counted from 1."""
WritesWith = Callable[[Sequence[str], Sequence[str], int], Sequence[str]]
"""`(questions, knowledge, round) -> texts`."""


@dataclass(frozen=True)
class Round:
    """What was written of one question in one round, and the answers that were read out of it (None: none stated)."""

    intuitive: str
    knowledge: str
    deep: str
    intuitive_answer: str | None
    deep_answer: str | None


@dataclass
class Outcome:
    """What became of one question.

    Attributes:
        question: As it was asked.
        answer: What is reported; None where no text stated any answer.
        agreed: Whether both ways came to a common answer.
        common: The answers that both have given, in the order in which the intuitive way gave them first.
        rounds: What was written, round by round.
    """

    question: str
    answer: str | None = None
    agreed: bool = False
    common: list[str] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def consistency_loop(
    questions: Sequence[str],
    intuitive: Writes,
    knowledge: Writes,
    deep: WritesWith,
    max_rounds: int = 20,
    extract: str | Callable[[str], str | None] = "gsm8k",
) -> list[Outcome]:
    """Ask both ways, round by round, until they have an answer in common.

    The answers of all rounds so far count: the loop ends for a question as soon as one answer was given by both ways,
    in whichever rounds. Of several common answers the one that was given most often, by both together, is reported; of
    equally frequent ones that which the intuitive way gave first. Without a common answer in `max_rounds` rounds the
    intuitive way's most frequent answer is reported, or the other's where it has none, and `agreed` is False.

    Paper: Li et al., 2025, LoRID, https://arxiv.org/abs/2508.13037. The official scoring counts a question as right if
    any common answer is, and reports nothing where there is none; here one answer is reported always.

    Args:
        questions: Asked together; those that are open go on.
        intuitive: Writes a rationale with an answer.
        knowledge: Writes the rules that a question needs.
        deep: Writes a rationale with an answer, given a question and such rules.
        max_rounds: At most so many, at least 1; each costs three texts for each open question.
        extract: Reads the answer out of a text: a name of `hfkd.eval.answers.EXTRACTORS`, or a function.

    Returns:
        One outcome for each question, in their order.

    Raises:
        ValueError: `max_rounds` is below 1, there is no such extractor, or not as many texts came back as were asked
            for.
    """
    read = _extractor(extract)
    if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 1:
        raise ValueError(f"max_rounds is {max_rounds!r}; expected a whole number of at least 1")
    outcomes = [Outcome(question) for question in questions]
    for number in range(1, max_rounds + 1):
        still_open = [outcome for outcome in outcomes if not outcome.agreed]
        if not still_open:
            break
        asked = [outcome.question for outcome in still_open]
        first = _as_many(intuitive(asked, number), asked, "intuitive")
        rules = _as_many(knowledge(asked, number), asked, "knowledge")
        second = _as_many(deep(asked, rules, number), asked, "deep")
        for outcome, *texts in zip(still_open, first, rules, second, strict=True):
            outcome.rounds.append(Round(*texts, read(texts[0]), read(texts[2])))
            _settle(outcome)
        closed = sum(outcome.agreed for outcome in still_open)
        logger.info("Round %d: %d of %d open questions were agreed on.", number, closed, len(still_open))
    return outcomes


def summary(outcomes: Sequence[Outcome], golds: Sequence[str | None] | None = None) -> dict[str, Any]:
    """What a loop cost and found. Shares are fractions.

    Args:
        outcomes: At least one.
        golds: The right answers, as many; None where one isn't known.

    Returns:
        `questions`; `agreed` (share); `rounds` (mean, and `histogram`: questions by the number of rounds that they
        took, with those that were never agreed on at the last one); `texts` (the mean number that was written for a
        question); `most_frequent` (the reported answer that is given most often, and its share). With golds,
        `accuracy` of the reported answers over the `graded` questions, its 95 % `interval`, `accuracy_agreed` and
        `accuracy_not_agreed` (null without such questions), and beside it what the first text of each way would have
        scored (`first_intuitive`, `first_deep`) and `any_common` (right if any common answer is: not a score of one
        answer, but the one that is published).

    Raises:
        ValueError: There are no outcomes, or not as many golds.
    """
    if not outcomes or (golds is not None and len(golds) != len(outcomes)):
        raise ValueError(
            f"got {len(outcomes)} outcomes and {'no' if golds is None else len(golds)} golds; expected at least one "
            "outcome, and as many golds"
        )
    lengths = Counter(len(outcome.rounds) for outcome in outcomes)
    reported = [outcome.answer for outcome in outcomes if outcome.answer is not None]
    top = majority(reported)
    found = {
        "questions": len(outcomes),
        "agreed": fmean(outcome.agreed for outcome in outcomes),
        "rounds": {
            "mean": fmean(len(outcome.rounds) for outcome in outcomes),
            "histogram": {str(length): lengths[length] for length in sorted(lengths)},
        },
        "texts": 3 * fmean(len(outcome.rounds) for outcome in outcomes),
        "most_frequent": {"answer": top, "share": sum(match(top, each) for each in reported) / len(outcomes)},
    }
    graded = [(outcome, gold) for outcome, gold in zip(outcomes, golds or (), strict=False) if gold is not None]
    return {**found, **(_grades(graded) if graded else {})}


def majority(answers: Sequence[str]) -> str | None:
    """The answer that is given most often, of equals the first one; None without answers."""
    return max(answers, key=lambda answer: sum(match(answer, other) for other in answers), default=None)


def _settle(outcome: Outcome) -> None:
    """Report what the rounds so far lead to."""
    first = [each.intuitive_answer for each in outcome.rounds if each.intuitive_answer is not None]
    second = [each.deep_answer for each in outcome.rounds if each.deep_answer is not None]
    outcome.common = _different([answer for answer in first if _among(answer, second)])
    outcome.agreed = bool(outcome.common)
    votes = [answer for answer in [*first, *second] if _among(answer, outcome.common)]
    outcome.answer = majority(votes or first or second)


def _different(answers: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for answer in answers:
        if not _among(answer, kept):
            kept.append(answer)
    return kept


def _among(answer: str, others: Sequence[str]) -> bool:
    return any(match(answer, other) for other in others)


def _grades(graded: Sequence[tuple[Outcome, str]]) -> dict[str, Any]:
    right = [match(outcome.answer, gold) for outcome, gold in graded]
    agreed = [hit for hit, (outcome, _) in zip(right, graded, strict=True) if outcome.agreed]
    others = [hit for hit, (outcome, _) in zip(right, graded, strict=True) if not outcome.agreed]
    return {
        "graded": len(graded),
        "accuracy": fmean(right),
        "interval": list(wilson_interval(sum(right), len(right))),
        "accuracy_agreed": fmean(agreed) if agreed else None,
        "accuracy_not_agreed": fmean(others) if others else None,
        "first_intuitive": fmean(match(outcome.rounds[0].intuitive_answer, gold) for outcome, gold in graded),
        "first_deep": fmean(match(outcome.rounds[0].deep_answer, gold) for outcome, gold in graded),
        "any_common": fmean(any(match(each, gold) for each in outcome.common) for outcome, gold in graded),
    }


def _extractor(extract: str | Callable[[str], str | None]) -> Callable[[str], str | None]:
    if callable(extract):
        return extract
    if extract not in EXTRACTORS:
        raise ValueError(f"there is no extractor {extract!r}; expected {', '.join(EXTRACTORS)}, or a function")
    return EXTRACTORS[extract]


def _as_many(texts: Sequence[str], questions: Sequence[str], who: str) -> list[str]:
    if isinstance(texts, str) or len(texts) != len(questions):
        got = "one text" if isinstance(texts, str) else f"{len(texts)} texts"
        raise ValueError(f"{who} gave {got} for {len(questions)} questions; expected a list with one for each")
    return list(texts)
