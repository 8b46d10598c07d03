"""How long answers are, in tokens, and which of them are too long for what is to write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from hfkd.preflight.findings import Finding
from hfkd.rollout.base import Completion

_NAME = "answer lengths"
_MANY = 0.05
_SHOWN, _QUOTE = 3, 40


def spread(lengths: Sequence[int]) -> dict[str, float]:
    """Smallest, median, 95 % and largest of some lengths.

    Args:
        lengths: In tokens, at least one.

    Returns:
        `count`, `min`, `median`, `p95` (the smallest length that 95 % don't exceed) and `max`.
    """
    ordered = sorted(lengths)
    place = max(0, -(-95 * len(ordered) // 100) - 1)
    return {
        "count": len(ordered),
        "min": ordered[0],
        "median": median(ordered),
        "p95": ordered[place],
        "max": ordered[-1],
    }


def in_words(figures: dict[str, float]) -> str:
    """A spread as a sentence's part."""
    return "{min} to {max} tokens, median {median:g}, 95 % have at most {p95}".format_map(figures)


def gold_lengths(lengths: Sequence[int], limit: int | None) -> Iterator[Finding]:
    """The data set's own answers, against the longest reply that an evaluation lets a model give.

    Args:
        lengths: Of the answers, in tokens.
        limit: `evaluation.max_new_tokens`; None where nothing is asked.
    """
    figures: dict[str, Any] = spread(lengths)
    words = f"The {len(lengths)} answers of the data set have {in_words(figures)}"
    if limit is None:
        yield Finding("pass", _NAME, f"{words}.", figures)
        return
    over = sum(length > limit for length in lengths) / len(lengths)
    figures |= {"evaluation.max_new_tokens": limit, "longer_share": over}
    if over:
        text = (
            f"{words}. {over:.0%} of them are longer than evaluation.max_new_tokens={limit}, so a model is stopped "
            "before it could give them whole. Raise it, unless the answer is read out of the beginning."
        )
        yield Finding("warning" if over > _MANY else "pass", _NAME, text, figures)
        return
    yield Finding("pass", _NAME, f"{words}, within evaluation.max_new_tokens={limit}.", figures)


def written_lengths(writer: str, answers: Sequence[Completion], limit: int) -> Iterator[Finding]:
    """What a model wrote, against the limit of what is to be learned.

    Args:
        writer: `teacher` or `student`.
        answers: What it wrote.
        limit: `data.generation.max_new_tokens`.
    """
    lengths = [len(answer.ids) for answer in answers]
    figures: dict[str, Any] = spread(lengths)
    cut = sum(not answer.finished for answer in answers) / len(answers)
    empty = sum(not answer.text.strip() for answer in answers) / len(answers)
    figures |= {"writer": writer, "data.generation.max_new_tokens": limit, "cut_share": cut, "empty_share": empty}
    first = ", ".join(repr(_quote(answer.text)) for answer in answers[:_SHOWN])
    words = (
        f"{len(answers)} answers of the {writer} (the first: {first}) have {in_words(figures)}; {cut:.0%} reach "
        f"data.generation.max_new_tokens={limit}"
    )
    if cut > _MANY:
        text = f"{words} and are cut there: the student would learn answers without their end. "
        yield Finding("warning", _NAME, text + "Raise data.generation.max_new_tokens, or give stop strings.", figures)
    elif empty > _MANY:
        text = f"{words}. {empty:.0%} say nothing at all; look at data.prompt, its stop strings above all."
        yield Finding("warning", _NAME, text, figures)
    else:
        yield Finding("pass", _NAME, f"{words}.", figures)


def _quote(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _QUOTE else text[: _QUOTE - 3] + "..."
