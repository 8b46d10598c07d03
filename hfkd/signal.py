"""What a teacher hands to the losses, and the names of what a loss may ask for.

The kind of teacher (a model in memory, the student's own weights behind another prompt) can't be seen in a signal:
that is its purpose.
"""

from __future__ import annotations

from dataclasses import dataclass

from hfkd.rows import DenseRows, TopKRows

DISTRIBUTION = "distribution"
"""The teacher's distribution over the next token, for each supervised token."""

NEEDS = frozenset({DISTRIBUTION})
"""Everything that a loss can ask a teacher for."""


@dataclass(frozen=True)
class TeacherSignal:
    """The teacher's word on N supervised tokens.

    Args:
        rows: Its distributions, in the order of the student's supervised tokens; None where nothing asked for them.
    """

    rows: DenseRows | TopKRows | None = None
