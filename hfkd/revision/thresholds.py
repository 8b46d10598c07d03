"""A threshold that moves with what was seen, one for each domain. Knows no model, no batch and no process.

Shapes: G domains.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class MovingThreshold:
    """A mean that forgets, over all items and for each domain, and the threshold that follows from both.

    A mean begins with the first value that it hears of. A domain's threshold is the overall mean times the share that
    the domain's mean has of the largest domain's: what a hard domain must reach is less.

    Args:
        groups: How many domains, G.
        decay: What stays of a mean at each step, from 0 to below 1.

    Attributes:
        means: [1 + G] float64, over all and by domain; NaN where nothing was heard yet.
    """

    def __init__(self, groups: int, decay: float) -> None:
        self.decay, self.means = decay, np.full(1 + groups, np.nan)

    def hear(self, sums: NDArray[np.float64], counts: NDArray[np.float64]) -> None:
        """Take in a step.

        Args:
            sums: [G] of the values of each domain.
            counts: [G] how many they were; a domain without any keeps its mean.
        """
        sums, counts = (np.concatenate([[values.sum()], values]) for values in (sums, counts))
        now = sums / np.maximum(counts, 1)
        moved = np.where(np.isnan(self.means), now, self.decay * self.means + (1 - self.decay) * now)
        self.means = np.where(counts > 0, moved, self.means)

    def thresholds(self) -> NDArray[np.float64]:
        """[G]; NaN for a domain that was never seen."""
        overall, domains = self.means[0], self.means[1:]
        largest = np.nan_to_num(domains).max()
        return overall * (domains / largest if largest > 0 else np.where(np.isnan(domains), np.nan, 1.0))
