"""One view of an example: token ids, and labels where something is learned.

Nothing is cut here and nothing is padded; limits are the data set's, padding is the collator's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from hfkd.batch import IGNORE
from hfkd.data.messages import Row
from hfkd.data.prompts import PromptBuilder


class Encoded(TypedDict):
    """One unpadded sequence: `input_ids`, and `labels` of the same length with -100 where nothing is learned."""

    input_ids: list[int]
    labels: list[int]


def encode(
    builder: PromptBuilder,
    row: Row,
    demonstrations: Sequence[Row] = (),
    *,
    privileged: bool = False,
    whole_text: bool = False,
) -> Encoded:
    """Tokenize one view of a row.

    Args:
        builder: Writes and tokenizes.
        row: The row that is learned.
        demonstrations: Rows shown before it; never supervised, unless `whole_text`.
        privileged: Whether the row's `privileged_context` is shown.
        whole_text: Learn every token of the text but the first, which nothing predicts, as the code released with
            SeCoKD does. The default learns the answer only.

    Returns:
        The ids and the labels.

    Raises:
        ValueError: The row has no answer, its answer has no token, or a template can't write it.
    """
    pieces = builder.encode_turns(row, demonstrations, privileged=privileged)
    if not any(ids for ids, supervised in pieces if supervised):
        raise ValueError("the answer of a row has no token, so there is nothing to learn; look at its completion")
    ids = [token for piece, _ in pieces for token in piece]
    if whole_text:
        return {"input_ids": ids, "labels": [IGNORE, *ids[1:]]}
    labels = [token if supervised else IGNORE for piece, supervised in pieces for token in piece]
    if labels[0] != IGNORE:
        raise ValueError(
            "the prompt of a row has no token, so nothing predicts its first answer token; write a prompt"
        )
    return {"input_ids": ids, "labels": labels}


def answer_start(encoded: Encoded) -> int:
    """The number of tokens before the last answer, whatever is learned of earlier turns."""
    labels, place = encoded["labels"], len(encoded["labels"])
    while place and labels[place - 1] == IGNORE:
        place -= 1
    while place and labels[place - 1] != IGNORE:
        place -= 1
    return place


def prompt_length(encoded: Encoded) -> int:
    """The number of tokens before the first one that is learned."""
    return next((place for place, label in enumerate(encoded["labels"]) if label != IGNORE), len(encoded["labels"]))
