"""How a model writes, whatever it says: lengths, answers that were cut or empty, how much it repeats itself.

Takes texts; it knows no model and no tokenizer. A word is what stands between white space.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

LONG_ANSWER = 5
"""From this mean number of words on, a likeness of texts says something: BLEU looks at four words in a row."""
_REPEATED = 4


def generation_quality(
    texts: Sequence[str], references: Sequence[str], *, tokens: Sequence[int], cut: int
) -> dict[str, Any]:
    """Figures of the completions of one evaluation. Shares are fractions.

    Args:
        texts: What the model wrote, at least one.
        references: The gold completions in the same order, whole, not the short answers in them.
        tokens: Length of each text.
        cut: How many reached the limit of tokens before they ended.

    Returns:
        `texts`; `tokens` (mean, median, longest); `cut`, `empty` (shares); `distinct_1`, `distinct_2` (different words
        and pairs of words, as a share of all of them in all texts; null where there are none); `repeated` (the mean
        share of runs of four words that stood in the same text before, over texts that have any; null where none is
        so long); and where the gold completions have five words or more on average, `likeness`, what the metric
        `rationale_similarity` says of both.

    Raises:
        ValueError: There are no texts, or not as many of each.
    """
    if not texts or not len(texts) == len(references) == len(tokens):
        raise ValueError(
            f"got {len(texts)} texts, {len(references)} gold completions and {len(tokens)} lengths; expected as many "
            "of each, and at least one"
        )
    words = [text.split() for text in texts]
    repeats = [share for share in map(_repeated_share, words) if share is not None]
    figures = {
        "texts": len(texts),
        "tokens": {"mean": fmean(tokens), "median": float(median(tokens)), "longest": max(tokens)},
        "cut": cut / len(texts),
        "empty": sum(not text.strip() for text in texts) / len(texts),
        "distinct_1": _distinct(words, 1),
        "distinct_2": _distinct(words, 2),
        "repeated": fmean(repeats) if repeats else None,
    }
    if is_long(references):
        figures["likeness"] = text_likeness(texts, references)
    return figures


def is_long(texts: Sequence[str]) -> bool:
    """Whether texts are long enough on average for a likeness of texts."""
    return bool(texts) and fmean(len(text.split()) for text in texts) >= LONG_ANSWER


def text_likeness(texts: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """BLEU and ROUGE-L of texts against others, from the metric module `rationale_similarity`."""
    from hfkd.eval.metrics import load_metric

    found = load_metric("rationale_similarity").compute(predictions=list(texts), references=list(references))
    return {name: float(found[name]) for name in ("bleu", "rouge_l")}


def _runs(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[place : place + length]) for place in range(len(words) - length + 1)]


def _distinct(texts: Sequence[Sequence[str]], length: int) -> float | None:
    found = [run for words in texts for run in _runs(words, length)]
    return len(set(found)) / len(found) if found else None


def _repeated_share(words: Sequence[str]) -> float | None:
    found = _runs(words, _REPEATED)
    return 1 - len(set(found)) / len(found) if found else None
