"""How alike two texts are: BLEU as sacreBLEU computes it, and ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sacrebleu.metrics import BLEU

_WORD = re.compile(r"\w+")


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of a set of texts, 0 to 100, with sacreBLEU's tokenizer and smoothing.

    Where all texts are shorter than four words, only n-grams as long as they are count: BLEU of equal texts would be 0
    otherwise.

    Args:
        predictions: What is judged.
        references: What each is compared with.
    """
    if not any(map(str.strip, references)) and not any(map(str.strip, predictions)):
        return 100.0
    score = BLEU(effective_order=True).corpus_score(list(predictions), [list(references)]).score
    return min(100.0, float(score))  # rounding makes it a little more


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 1; two texts without a word are alike.

    Args:
        prediction: What is judged.
        reference: What it is compared with.
    """
    ours, theirs = (_WORD.findall(text.casefold()) for text in (prediction, reference))
    if not ours and not theirs:
        return 1.0
    return 2 * _longest_common(ours, theirs) / (len(ours) + len(theirs))


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence: a whole row of the usual table at once, its steps as bits of one
    number.
    """
    places: dict[str, int] = {}
    for number, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << number
    everywhere = (1 << len(first)) - 1
    free = everywhere
    for word in second:
        taken = free & places.get(word, 0)
        free = (free + taken | free - taken) & everywhere
    return len(first) - free.bit_count()
