"""From the text that a model wrote to the answer it gave, and from two answers to right or wrong.

An extractor reads one text and returns the short answer that is stated in it, or None where it states none: a missing
answer is wrong, never guessed. All of them read the whole text, so an answer counts wherever it stands, and where
several are stated the last one counts. `match` is exact: a numeric tolerance is 0 unless the caller asks for one.

This module does not know which data set a text comes from, how it was generated, or how often an answer occurs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

# A number as people write it: sign, currency, thousands in groups of three, decimals. A minus directly after a digit
# or a letter is an operator or a hyphen ("10-3", "24-hour"), and a digit inside a word ("H2O") is no number. Powers of
# ten and fractions are not evaluated.
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-+]?)\\?[$€£]?(?P<negative>-?)"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)
_WHOLE_NUMBER = re.compile(r"[-+]?[$€£]?-?(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d*)?\s*%?")
_MARKER = re.compile(r"####|\banswer\s+is\b\s*:?|\banswer\s*:", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)|\n")
_STATED_LETTER = re.compile(
    r"\b(?i:answer(?:\s+is\b)?\s*:?\s*(?:option\s+|choice\s+)?)(?:[*$]|\\boxed\{|\\text\{)*"
    r"(?:\(\s*(?P<bracketed>[A-Ja-j])\s*\)|(?P<bare>[A-HJ])(?![\w'’]))"
)
_BRACKETED_LETTER = re.compile(r"\(\s*([A-J])\s*\)")
_LEADING_LETTER = re.compile(r"\s*(?:([A-J])\s*[.):]?\s*(?:\n|$)|([A-J])[.):]\s)")
_STATED_YES_NO = re.compile(r"\banswer(?:\s+is\b)?\s*:?\s*[*\"'(]*(yes|no)\b", re.IGNORECASE)
_LEADING_YES_NO = re.compile(r"\W*(yes|no)\b(?!\s+\w)", re.IGNORECASE)
_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def _plain_decimal(value: Decimal) -> str:
    text = format(value, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _numbers(text: str) -> list[str]:
    """All numbers of a text in reading order, in one spelling: no commas, no currency, no plus, no trailing zeros."""
    found = []
    for hit in _NUMBER.finditer(text.replace("\u2212", "-")):
        value = Decimal(hit["digits"].replace(",", ""))
        found.append(_plain_decimal(-value if "-" in (hit["sign"], hit["negative"]) else value))
    return found


def extract_text(text: str) -> str | None:
    """The first line that says something, without spaces around it; None for an empty text."""
    stripped = text.strip()
    return stripped.splitlines()[0].strip() if stripped else None


def extract_last_number(text: str) -> str | None:
    """The last number of the text, in one spelling (`"$1,234.50"` gives `"1234.5"`); None where there is none."""
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def extract_gsm8k(text: str) -> str | None:
    """The number that the text states as its answer.

    Looks after the last `####`, `answer is` or `answer:` that a number follows in the same sentence. The first number
    there counts ("the answer is 3 apples out of 10" gives `"3"`), or the only number after an equals sign ("the answer
    is 3 + 4 = 7" gives `"7"`). Without such a statement, the last number of the text.
    """
    for marker in reversed(list(_MARKER.finditer(text))):
        rest = text[marker.end() :].lstrip()
        end = _SENTENCE_END.search(rest)
        sentence = rest[: end.start()] if end else rest
        after_equals = _numbers(sentence.rsplit("=", 1)[-1])
        numbers = after_equals if len(after_equals) == 1 else _numbers(sentence)
        if numbers:
            return numbers[0]
    return extract_last_number(text)


def extract_choice(text: str) -> str | None:
    """The letter of the option that the text chooses, as a capital; None where it chooses none.

    The last "answer is B" or "answer is (B)" counts; without one, a text that is a letter or begins with one ("B", "B)
    five"); then the last bracketed capital. A bare small letter is never taken: "the answer is a dog" chooses nothing.
    """
    stated = list(_STATED_LETTER.finditer(text))
    if stated:
        return (stated[-1]["bracketed"] or stated[-1]["bare"]).upper()
    leading = _LEADING_LETTER.match(text)
    if leading:
        return leading[1] or leading[2]
    bracketed = _BRACKETED_LETTER.findall(text)
    return bracketed[-1] if bracketed else None


def extract_yes_no(text: str) -> str | None:
    """`"yes"` or `"no"`; None where the text holds neither word.

    What is stated last after "answer is" counts, else a yes or no that the text begins with, else the last of the two
    words.
    """
    stated = _STATED_YES_NO.findall(text)
    if stated:
        return stated[-1].lower()
    leading = _LEADING_YES_NO.match(text)
    if leading:
        return leading[1].lower()
    words = _YES_NO.findall(text)
    return words[-1].lower() if words else None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "text": extract_text,
    "last_number": extract_last_number,
    "gsm8k": extract_gsm8k,
    "choice": extract_choice,
    "yes_no": extract_yes_no,
}


def _normalise(answer: str) -> str:
    collapsed = " ".join(answer.split()).casefold()
    bare = collapsed.rstrip(".").rstrip() or collapsed
    letter = re.fullmatch(r"\(\s*([a-z])\s*\)|([a-z])\)?", bare)
    return (letter[1] or letter[2]) if letter else bare


def _parse_number(answer: str) -> Decimal | None:
    """The number that the whole of `answer` is, or None. Decimal, so that long integers keep every digit."""
    text = answer.strip().replace("\u2212", "-")
    if not any(character.isdigit() for character in text) or not _WHOLE_NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(re.sub(r"[$€£,%\s]", "", text))
    except InvalidOperation:
        return None


def match(prediction: str | None, gold: str, tolerance: float = 0.0) -> bool:
    """Whether a prediction is the gold answer.

    Equal after dropping case, spaces around and repeated spaces, a trailing period, and the brackets of a single
    letter. If both are finite numbers, equal when `|prediction - gold| <= tolerance * max(1, |gold|)`; with the
    default of 0 they must be the same number ("8.0" is 8, and 95 is not 100). Currency and percent signs are not part
    of a number.

    Args:
        prediction: what an extractor returned; None is always wrong. gold: the right answer. tolerance: largest
        allowed difference, relative to the gold answer and absolute below 1; finite and not negative.

    Returns:
        True when the prediction counts as right.

    Raises:
        ValueError: if the tolerance is negative or not finite.
    """
    if not math.isfinite(tolerance) or tolerance < 0:
        raise ValueError(
            f"tolerance is {tolerance}; expected a finite number that is not negative. Use 0 for an exact match."
        )
    if prediction is None:
        return False
    left, right = _normalise(prediction), _normalise(gold)
    if left == right:
        return True
    left_number, right_number = _parse_number(left), _parse_number(right)
    if left_number is None or right_number is None:
        return False
    if tolerance == 0:
        return left_number == right_number
    return abs(left_number - right_number) <= Decimal(repr(float(tolerance))) * max(Decimal(1), abs(right_number))
