"""Strict scores of extracted spans: one counts as found if its text and its type are those of a gold one, exactly.

Knows texts and sets; who wrote the texts is known elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SpanScores:
    """Counts over all texts, and what follows from them.

    Attributes:
        correct: Spans that were found.
        predicted: Spans that were named.
        gold: Spans that there are.
        unreadable: Texts that were no list; they count as naming nothing.
    """

    correct: int
    predicted: int
    gold: int
    unreadable: int = 0

    @property
    def precision(self) -> float:
        """Share of what was named that is right; 1 where nothing was named and nothing was there."""
        return self.correct / self.predicted if self.predicted else float(not self.gold)

    @property
    def recall(self) -> float:
        """Share of what is there that was named; 1 where nothing was there."""
        return self.correct / self.gold if self.gold else 1.0

    @property
    def f1(self) -> float:
        """2 * correct / (predicted + gold); 1 where both are 0, so that a right "nothing" is right."""
        total = self.predicted + self.gold
        return 2 * self.correct / total if total else 1.0


def span_scores(predicted: Iterable[Collection[Hashable] | None], gold: Iterable[Collection[Hashable]]) -> SpanScores:
    """Compare the spans of each text with its gold ones, and count over all texts (micro average).

    Args:
        predicted: The spans of each text, as anything that can be compared: `(type, text)`, `(start, end, type)`, or
            texts where the type is the question's. Each counts once in a text. None is an answer that couldn't be
            read.
        gold: As many.

    Raises:
        ValueError: There are more of one than of the other.
    """
    correct = named = there = unreadable = 0
    for ours, theirs in zip(list(predicted), list(gold), strict=True):
        unreadable += ours is None
        found, right = set(ours or ()), set(theirs)
        correct, named, there = correct + len(found & right), named + len(found), there + len(right)
    return SpanScores(correct, named, there, unreadable)


def read_spans(text: str) -> list[str]:
    """The texts of a JSON list, stripped, each once, in their order; what stands around the list is left out.

    Raises:
        ValueError: There is no JSON list of texts in it.
    """
    items = read_list(text)
    if not all(isinstance(item, str) and item.strip() for item in items):
        raise ValueError(f"the list holds {next(i for i in items if not isinstance(i, str) or not i.strip())!r}")
    return list(dict.fromkeys(item.strip() for item in items))


def read_list(text: str) -> list[Any]:
    """The first JSON list of a text; other words in brackets before it are left out.

    Raises:
        ValueError: There is none, or it is cut off: what lies within brackets that don't close isn't looked at.
    """
    reason, depth = "there is no JSON list in it", 0
    for bracket in re.finditer(r"[\[\]]", text):
        if bracket[0] == "]":
            depth = max(0, depth - 1)
            continue
        if depth == 0:
            try:
                return json.JSONDecoder().raw_decode(text, bracket.start())[0]
            except (ValueError, RecursionError) as error:
                reason = f"it has no valid JSON list: {error}"
        depth += 1
    raise ValueError(reason)


def span_f1(row: Mapping[str, Any], text: str) -> float:
    """Strict F1 of one answer against the row's `answer`, a JSON list: `verifier: hfkd.labels.spans:span_f1`.

    An answer that is no list is 0 even where nothing is to be found.

    Raises:
        ValueError: The row's answer is no list.
    """
    gold = read_spans(row.get("answer") or "")
    try:
        return span_scores([read_spans(text)], [gold]).f1
    except ValueError:
        return 0.0


def score_predictions(lines: Sequence[Mapping[str, Any]]) -> SpanScores:
    """Strict scores of lines that `hfkd train` leaves in predictions.jsonl, of one stage and number of shots.

    Args:
        lines: Of `hfkd.eval.predictions.read_predictions`; of each, `gold` and `text` are read.

    Raises:
        ValueError: A gold answer is no JSON list of texts.
    """
    return span_scores([_or_none(line["text"]) for line in lines], [read_spans(line["gold"]) for line in lines])


def _or_none(text: str) -> list[str] | None:
    try:
        return read_spans(text)
    except ValueError:
        return None
