"""How far a share could be from the truth, because only so many items were asked."""

from __future__ import annotations

import math

_Z = 1.959963984540054  # both tails of a normal distribution beyond it hold 5 %


def wilson_interval(right: float, items: int) -> tuple[float, float]:
    """The 95 % interval of a share, after Wilson (1927): never below 0 or above 1, and never of width 0.

    Args:
        right: How many of them count, from 0 to `items`.
        items: How many there are, at least 1.
    """
    share, per_item = right / items, _Z * _Z / items
    centre = (share + per_item / 2) / (1 + per_item)
    half = _Z * math.sqrt(share * (1 - share) / items + per_item / (4 * items)) / (1 + per_item)
    low, high = centre - half, centre + half
    return (0.0 if right == 0 else max(0.0, low)), (1.0 if right == items else min(1.0, high))
