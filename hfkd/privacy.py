"""How private each token of a text is, from 0 to 1: by patterns, by rarity, or by a function of the user's own.

Works on token ids and on the text that they stand for. It knows no model, no batch and no loss, and it knows no secret
either: a pattern sees what secrets often look like, and what looks otherwise is not found.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from hfkd.masking import KNOWN_SECRETS

Span = tuple[int, int] | tuple[int, int, float]
"""Where something private begins and ends in a text, in characters, and how private it is (1 where it isn't said)."""

SpanFinder = Callable[[str], Iterable[Span]]
"""A function of a text that gives its private spans."""

_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+")  # no address has more before its @; without a bound: n ** 2
_DASHES = r"\-\u2010-\u2015\u2212"
_NUMBER = re.compile(rf"\d(?:(?:[\s.,:/()+{_DASHES}]{{0,2}}|\)?\s?[/{_DASHES}]\s?\(?)\d)*")
_WORD = re.compile(r"[A-Za-z0-9]+(?:[-_][A-Za-z0-9]+)*")
_ID_LENGTH, _ID_DIGITS = 6, 3


class TokenScorer(ABC):
    """Says how private tokens are. `scores` is the method to write."""

    @abstractmethod
    def scores(self, ids: Sequence[int]) -> list[float]:
        """Score one stretch of text.

        Args:
            ids: Its token ids, without a gap.

        Returns:
            One number from 0 (everybody may know it) to 1 for each.
        """


class SpanScorer(TokenScorer):
    """Scores tokens by the spans of the text that they touch: the highest score counts.

    Args:
        tokenizer: Of the ids.
        find: Gives the private spans of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, find: SpanFinder) -> None:
        self.tokenizer, self.find = tokenizer, find

    def scores(self, ids: Sequence[int]) -> list[float]:
        """As in `TokenScorer`.

        Raises:
            ValueError: The function gives something else than spans.
        """
        text, places = placed(self.tokenizer, ids)
        marks = [0.0] * len(text)
        for start, end, score in map(self._checked, self.find(text)):
            for place in range(max(0, start), min(end, len(text))):
                marks[place] = max(marks[place], score)
        inside = [[place for place in range(*one) if not text[place].isspace()] or range(*one) for one in places]
        return [max((marks[place] for place in some), default=0.0) for some in inside]

    def _checked(self, span: Span) -> tuple[int, int, float]:
        try:
            start, end, score = span if len(span) == 3 else (*span, 1.0)
            start, end, score = int(start), int(end), float(score)
        except (TypeError, ValueError):
            start, end, score = 0, 0, math.nan
        if not 0 <= score <= 1 or start > end:
            name = getattr(self.find, "__qualname__", repr(self.find))
            raise ValueError(
                f"{name} gives the span {span!r}; expected (start, end) in characters, or (start, end, score) with a "
                "score from 0 to 1."
            )
        return start, end, score


class RarityScorer(TokenScorer):
    """Scores tokens by how rare they are: linear in the logarithm of the frequency.

    A secret that is spelled in common tokens (digits, where each is a token) isn't rare to it.

    Args:
        counts: How often each id occurs; others count as if they had occurred once.
        common: The share of all tokens from which on an id isn't private at all.
        rare: The share up to which it is wholly so.

    Raises:
        ValueError: The shares aren't in order, nothing was counted, or too little for any id to be as rare as `rare`.
    """

    def __init__(self, counts: Mapping[int, int], common: float = 1e-3, rare: float = 1e-5) -> None:
        check_shares(common, rare)
        self.total = sum(counts.values())
        if not self.total:
            raise ValueError("No token was counted, so that none is rare. Give texts to count, or use patterns.")
        if self.total * rare < 1 - 1e-9:
            raise ValueError(
                f"{self.total} tokens were counted, so none is rarer than 1 in {self.total}, and rare is {rare}: "
                f"hardly anything would be hidden. Set rare to {1.05 / self.total:.1e} or more and common well above "
                "it, count more text, or use patterns."
            )
        self.counts, self.common, self.rare = counts, common, rare

    def scores(self, ids: Sequence[int]) -> list[float]:
        """As in `TokenScorer`."""
        whole = math.log(self.common / self.rare)
        shares = (max(1, self.counts.get(one, 0)) / self.total for one in ids)
        return [min(1.0, max(0.0, math.log(self.common / share) / whole)) for share in shares]


def check_shares(common: float, rare: float) -> None:
    """Refuse shares of tokens that can't tell common from rare ones.

    Raises:
        ValueError: They aren't 0 < rare < common <= 1.
    """
    if not 0 < rare < common <= 1:
        raise ValueError(
            f"common is {common} and rare is {rare}; expected shares of all tokens, 0 < rare < common <= 1."
        )


def pattern_finder(patterns: Sequence[str] | None = None, min_digits: int = 4) -> SpanFinder:
    """Make a function that finds what private information often looks like.

    Args:
        patterns: Names of `PATTERNS`, and regular expressions of one's own; None takes all names.
        min_digits: The digits from which on a number counts; separators between them (a telephone number's, a date's,
            a dash or a slash with spaces around it, a line end) belong to it.

    Raises:
        ValueError: There is no pattern, one is no regular expression or finds the empty text, or `min_digits` is below
            1.
    """
    chosen = list(PATTERNS) if patterns is None else patterns
    if isinstance(chosen, str) or not chosen:
        raise ValueError(
            f"patterns is {patterns!r}; expected a list of names ({', '.join(PATTERNS)}) and regular expressions, or "
            "null for all names."
        )
    if isinstance(min_digits, bool) or not isinstance(min_digits, int) or min_digits < 1:
        raise ValueError(f"min_digits is {min_digits!r}; expected a whole number, at least 1.")
    finders = [PATTERNS[one] if one in PATTERNS else _own(one) for one in chosen]

    def patterns_found(text: str) -> Iterator[Span]:
        for find in finders:
            yield from find(text, min_digits)

    return patterns_found


def placed(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of some tokens, and where each of them lies in it, in characters.

    Each token is decoded behind the one before it, so that a tokenizer which drops a leading space doesn't drop those
    in between. Tokens that are bytes of one character lie at the same place.
    """
    text, places, before, waiting = "", [], [], []
    for place, one in enumerate(ids):
        waiting.append(one)
        known = _decoded(tokenizer, before)
        piece = _decoded(tokenizer, before + waiting)[len(known) :]
        if piece.endswith("\ufffd") and place + 1 < len(ids):
            continue  # not a whole character yet
        places += [(len(text), len(text) + len(piece))] * len(waiting)
        text, before, waiting = text + piece, waiting, []
    return text, places


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


def _emails(text: str, min_digits: int) -> Iterator[Span]:
    yield from (found.span() for found in _EMAIL.finditer(text))


def _numbers(text: str, min_digits: int) -> Iterator[Span]:
    for found in _NUMBER.finditer(text):
        if sum(map(str.isdigit, found[0])) >= min_digits:
            yield found.span()


def _ids(text: str, min_digits: int) -> Iterator[Span]:
    """Words of letters and several digits (serial numbers, hashes, accounts), and keys whose form is known."""
    for found in _WORD.finditer(text):
        digits = sum(map(str.isdigit, found[0]))
        if len(found[0]) >= _ID_LENGTH and digits >= _ID_DIGITS and any(map(str.isalpha, found[0])):
            yield found.span()
    for pattern in KNOWN_SECRETS:
        yield from (found.span() for found in pattern.finditer(text))


def _own(pattern: str) -> Callable[[str, int], Iterator[Span]]:
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"patterns has {pattern!r}, which is neither a name ({', '.join(PATTERNS)}) nor a regular expression "
            f"({error})."
        ) from error
    if compiled.fullmatch(""):
        raise ValueError(f"patterns has {pattern!r}, which finds the empty text. Take + in place of *.")

    def found_by(text: str, min_digits: int) -> Iterator[Span]:
        yield from (found.span() for found in compiled.finditer(text))

    return found_by


PATTERNS: dict[str, Callable[[str, int], Iterator[Span]]] = {"emails": _emails, "numbers": _numbers, "ids": _ids}
"""What the built-in patterns find, by name: functions of a text and of the fewest digits of a number."""
