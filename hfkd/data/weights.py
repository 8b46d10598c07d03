"""How much each supervised token counts: from a column of the rows, or from a function of the user's own.

A weight multiplies the token's loss; the loss is still divided by the number of tokens, so that weights that aren't
about 1 on average change its size. Nothing here knows prompts or models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

TokenWeights = str | Callable[[Mapping[str, Any], list[int]], Sequence[float]]
"""The name of a column that holds one number for the row or one for each supervised token; or a function of the row
and its supervised ids that returns one number for each.
"""


def weights_of(source: TokenWeights, row: Mapping[str, Any], labels: Sequence[int], ignore: int) -> list[float]:
    """The weights of a row, one for each position of its view.

    Args:
        source: A column or a function.
        row: As it came.
        labels: Of the student's view, `ignore` where nothing is learned. The first position is never learned.
        ignore: That label.

    Returns:
        One number for each label; 0 where nothing is learned.

    Raises:
        ValueError: The column is missing, or there are other than one number for each supervised token, or one of them
            is negative or not finite.
    """
    places = [place for place, label in enumerate(labels) if place and label != ignore]
    if callable(source):
        name, found = getattr(source, "__qualname__", repr(source)), source(row, [labels[place] for place in places])
    elif source in row:
        name, found = f"the column {source!r}", row[source]
    else:
        raise ValueError(f"token_weights names the column {source!r}, but the row has {sorted(row)}")
    if _is_number(found):
        found = [found] * len(places)
    if isinstance(found, str) or not isinstance(found, Iterable) or not all(map(_is_number, found := list(found))):
        raise ValueError(f"{name} gives {found!r}; expected a number, or a list of numbers")
    numbers = [float(one) for one in found]
    if len(numbers) != len(places):
        raise ValueError(
            f"{name} gives {len(numbers)} token weights, but {len(places)} tokens are supervised (the answer and what "
            "ends it); give one number for each of them, or one for the row"
        )
    if wrong := [one for one in numbers if not 0 <= one < math.inf]:
        raise ValueError(f"{name} gives the token weight {wrong[0]}; expected finite numbers, none below 0")
    whole = [0.0] * len(labels)
    for place, number in zip(places, numbers, strict=True):
        whole[place] = number
    return whole


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
