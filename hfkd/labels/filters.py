"""Which of a teacher's answers are kept: what a filter is, and the four that there are.

A filter reads answers and says which stay; what becomes of rows that lose all of theirs is known elsewhere.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from hfkd.data.messages import prompt_messages, text_of
from hfkd.data.verify import as_verifier
from hfkd.eval.answers import extract_yes_no
from hfkd.labels.asking import Outcome, Question
from hfkd.labels.plan import GenerationSection
from hfkd.labels.templates import Answer, FormatError, check_places, compiled, fill
from hfkd.recipe.source import explain

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)")

Ask = Callable[[Sequence[Question]], list[Outcome]]
"""Asks the teacher; an outcome for each question, in their order."""


@dataclass
class Labelled:
    """A row with its answers.

    Attributes:
        number: Of the row in the source, from 0.
        row: As it was read.
        asked: How many texts were asked for.
        answers: Those that are left.
        reasons: Why the others aren't: `(kind, words)` each.
        different: How many different texts there were before any filter.
    """

    number: int
    row: Mapping[str, Any]
    asked: int
    answers: list[Answer]
    reasons: list[tuple[str, str]] = field(default_factory=list)
    different: int = 0


class Filter(ABC):
    """Drops answers. `judge` is the method to write."""

    @abstractmethod
    def judge(self, rows: Sequence[Labelled], ask: Ask) -> list[list[str]]:
        """Say what is wrong with each answer of each row.

        Args:
            rows: Each with at least one answer; none of them may be changed.
            ask: For filters that ask the teacher.

        Returns:
            For each row and each of its answers, why it is dropped, in words; an empty text keeps it.
        """


class FormatFilter(Filter):
    """Limits of what a student is to write. The form that a template asks for is checked before, and asked for again.

    Args:
        pattern: A regular expression that the whole completion must match.
        forbidden: Texts that must not stand in it, whatever the case.
        min_chars: Its least length.
        max_chars: Its greatest length.
    """

    def __init__(
        self,
        pattern: str | None = None,
        forbidden: list[str] | None = None,
        min_chars: int | None = None,
        max_chars: int | None = None,
    ) -> None:
        if pattern is None and not forbidden and min_chars is None and max_chars is None:
            raise ValueError("expected pattern, forbidden, min_chars or max_chars; without them nothing is dropped")
        if not isinstance(forbidden or [], list) or not all(isinstance(one, str) and one for one in forbidden or []):
            raise ValueError(f"forbidden is {forbidden!r}; expected a list of texts")
        if min_chars is not None and max_chars is not None and min_chars > max_chars:
            raise ValueError(f"min_chars is {min_chars} and max_chars {max_chars}; nothing has such a length")
        self.pattern = compiled("pattern", pattern)
        self.forbidden = [one.casefold() for one in forbidden or []]
        self.min_chars, self.max_chars = min_chars, max_chars

    def judge(self, rows: Sequence[Labelled], ask: Ask) -> list[list[str]]:
        """Look at each completion by itself."""
        return [[self._fault(answer.completion) for answer in one.answers] for one in rows]

    def _fault(self, text: str) -> str:
        if self.min_chars is not None and len(text) < self.min_chars:
            return f"it has {len(text)} characters, fewer than {self.min_chars}"
        if self.max_chars is not None and len(text) > self.max_chars:
            return f"it has {len(text)} characters, more than {self.max_chars}"
        if found := next((one for one in self.forbidden if one in text.casefold()), None):
            return f"it holds {found!r}"
        if self.pattern is not None and not self.pattern.fullmatch(text):
            return f"it doesn't match {self.pattern.pattern!r}"
        return ""


class VerifierFilter(Filter):
    """Keeps answers that a checker calls right; it reads the short answer, not the reasons before it.

    Args:
        verifier: `exact`, `contains` (against the source's `answer`), `reasoning_gym`, or `package.module:function`.
        least: The smallest mark that is kept, above 0 and up to 1.
    """

    def __init__(self, verifier: str, least: float = 1.0) -> None:
        if not 0 < least <= 1:
            raise ValueError(f"least is {least}; expected a mark above 0 and up to 1 (right)")
        self.name, self.least = verifier, float(least)
        self._verifier = as_verifier(verifier)

    def judge(self, rows: Sequence[Labelled], ask: Ask) -> list[list[str]]:
        """Mark each answer.

        Raises:
            VerifierError: The verifier raised, or gave no number from 0 to 1.
        """
        return [[self._fault(one.row, answer.answer) for answer in one.answers] for one in rows]

    def _fault(self, row: Mapping[str, Any], text: str) -> str:
        mark = self._verifier(row, text)
        return "" if mark >= self.least else f"{self.name} gives {text[:60]!r} the mark {mark:g}"


class AgreementFilter(Filter):
    """Keeps the answer that most samples of a row agree on, if enough of them do; reasons may differ.

    Args:
        least: The smallest share, above 0 and up to 1, of the samples that were asked for: one that failed or was
            dropped before agrees with nobody. Of two answers with as many votes none is kept.
    """

    def __init__(self, least: float = 0.5) -> None:
        if not 0 < least <= 1:
            raise ValueError(f"least is {least}; expected a share above 0 and up to 1")
        self.least = float(least)

    def judge(self, rows: Sequence[Labelled], ask: Ask) -> list[list[str]]:
        """Count the votes of each row."""
        return [self._faults(one) for one in rows]

    def _faults(self, one: Labelled) -> list[str]:
        votes = Counter(answer.value for answer in one.answers).most_common(2)
        winner, most = votes[0]
        if len(votes) > 1 and votes[1][1] == most:
            return [f"two answers have {most} of {one.asked} votes each"] * len(one.answers)
        if most < self.least * one.asked:
            return [f"the most frequent answer has {most} of {one.asked} votes"] * len(one.answers)
        return ["" if answer.value == winner else f"outvoted, {most} of {one.asked}" for answer in one.answers]


class SelfEvaluationFilter(Filter):
    """Asks the teacher what it thinks of each answer, one more request each. A verdict that can't be had drops it.

    Args:
        instruction: Of `{prompt}` and `{answer}` (all that a student would learn). Without one it asks for yes or no,
            or for a grade.
        grades: None for yes or no; else the best grade, 1 being the worst.
        least: With grades, the smallest that is kept.
        generation: How a verdict is written: keys as in the plan's `generation`, of which nothing is taken over. What
            isn't given is 64 tokens, temperature 0 and no stop strings.
    """

    def __init__(
        self,
        instruction: str | None = None,
        grades: int | None = None,
        least: int | None = None,
        generation: dict | None = None,
    ) -> None:
        if (grades is None) != (least is None) or (grades is not None and not (grades >= 2 and 1 < least <= grades)):
            raise ValueError(
                f"grades is {grades} and least {least}; expected neither (yes or no), or least from 2 to grades"
            )
        ending = "Is the answer right? Reply with one word, yes or no."
        if grades is not None:
            ending = (
                f"How good is the answer, from 1 (useless) to {grades} (right in all it says)? Reply with a number."
            )
        self.instruction = instruction or f"A task:\n{{prompt}}\n\nAn answer to it:\n{{answer}}\n\n{ending}"
        check_places("instruction", self.instruction, ("answer",), ("prompt",))
        self.grades, self.least = grades, least
        self.generation = _verdicts(generation)

    def judge(self, rows: Sequence[Labelled], ask: Ask) -> list[list[str]]:
        """Ask about all answers at once."""
        outcomes = iter(ask([self._question(one.row, answer) for one in rows for answer in one.answers]))
        return [[self._fault(next(outcomes)) for _ in one.answers] for one in rows]

    def _question(self, row: Mapping[str, Any], answer: Answer) -> Question:
        task = "\n\n".join(text_of(message.get("content")) for message in prompt_messages(row))
        content = fill(self.instruction, prompt=task, answer=answer.completion)
        return Question([{"role": "user", "content": content}], self._verdict, generation=self.generation)

    def _verdict(self, text: str) -> int:
        """1 for yes and 0 for no, or the grade.

        Raises:
            FormatError: There is none in the text.
        """
        if self.grades is None:
            word = extract_yes_no(text)
            if word is None:
                raise FormatError("there is no yes or no in the verdict")
            return int(word == "yes")
        scale = rf"\b1\s*(?:to|-|–)\s*{self.grades}\b|(?:/|\bout of\b|\bof\b)\s*{self.grades}\b"
        numbers = [float(found) for found in _NUMBER.findall(re.sub(scale, " ", text, flags=re.IGNORECASE))]
        if len(numbers) != 1 or numbers[0] not in range(1, self.grades + 1):
            raise FormatError(f"there is no grade from 1 to {self.grades} in the verdict, or another number beside it")
        return int(numbers[0])

    def _fault(self, outcome: Outcome) -> str:
        if outcome.value is None:
            return f"no verdict: {outcome.words}"
        if outcome.value >= (1 if self.least is None else self.least):
            return ""
        return "the teacher calls it wrong" if self.grades is None else f"the teacher's grade is {outcome.value}"


def _verdicts(given: dict[str, Any] | None) -> GenerationSection:
    try:
        return GenerationSection.model_validate({"max_tokens": 64, **(given or {})})
    except ValidationError as error:
        raise ValueError("; ".join(f"generation.{line}" for line in explain(error, GenerationSection))) from None


FILTERS: dict[str, type[Filter]] = {
    "format": FormatFilter,
    "verifier": VerifierFilter,
    "agreement": AgreementFilter,
    "self_evaluation": SelfEvaluationFilter,
}
"""The filters by the keys that plans use."""
