"""Which tokens of a prompt mislead a student, from how much student and teacher lean on each; and texts without them.

Arithmetic on numbers and characters; it knows no model and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Span = tuple[int, int]
"""From a character of a text to the one before another."""


def rescaled(values: np.ndarray) -> np.ndarray:
    """Stretch numbers to 0 .. 1; where all are alike, 0."""
    lowest, highest = values.min(), values.max()
    return (values - lowest) / (highest - lowest) if highest > lowest else np.zeros_like(values)


def leanings(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """How much more the teacher leans on each token than the student does.

    Args:
        student: [n] gradient norms, >= 0, at most every one 0.
        teacher: [n] the same.

    Returns:
        [n] between 0 (the student most of all, the teacher least) and 1; all 0 where the two lean alike.
    """
    return rescaled(rescaled(teacher) - rescaled(student))


def confounding(leaning: np.ndarray, share: float, cap: float) -> np.ndarray:
    """Mark the tokens that the student leans on and the teacher doesn't.

    Args:
        leaning: [n] from `leanings`.
        share: The tokens in the lowest share of the n are marked: those up to the one at place int(share * n) of the
            ascending order, so at least one, and all that equal it.
        cap: The most that a marked token's leaning may be.

    Returns:
        [n] booleans; none is marked where all tokens are alike.
    """
    if not leaning.size or leaning.max() <= leaning.min():
        return np.zeros(leaning.shape, dtype=bool)
    return leaning <= min(np.sort(leaning)[int(share * leaning.size)], cap)


def runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """The stretches of marked places, each from its first place to the one behind its last."""
    found: list[tuple[int, int]] = []
    for place, marked in enumerate(marks):
        if not marked:
            continue
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found


def without(text: str, span: Span) -> str:
    """A text without a span, and without the space that would be left over where words stood around it."""
    before, after = text[: span[0]], text[span[1] :]
    if after.startswith(" ") and (not before or before[-1].isspace()):
        return before + after[1:]
    return before.removesuffix(" ") if not after else before + after
