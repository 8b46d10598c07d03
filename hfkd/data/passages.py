"""Rows out of plain texts, which have no question and no answer: their beginning, to be learned as a whole.

Knows words and not tokens, so how long a row is for a model is only roughly known here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

WORDS = 64
"""The most words of a passage: about 85 tokens of a vocabulary of 49,152, and more than 96 in one passage of five."""

_OPENING = re.compile(rf"\s*(\S+)\s+(\S+(?:\s+\S+){{0,{WORDS - 2}}})")


def opening(row: Mapping[str, Any]) -> dict[str, str]:
    """The first words of a document: the first one is the prompt, the others are the completion.

    Meant for `data.whole_text: true` with the templates `question: "{prompt}"` and `answer: " {completion}"`.

    Args:
        row: Has the document in the column `text`.

    Raises:
        ValueError: There is no such column, or less than two words in it.
    """
    text = row.get("text")
    found = _OPENING.match(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"expected a column text with at least two words; got {str(text)[:60]!r} in {', '.join(row)}")
    return {"prompt": found[1], "completion": found[2], "answer": found[2]}
