"""What a teacher hands to the losses, and the names of what a loss may ask for.

The kind of teacher (a model in memory, the student's own weights behind another prompt) can't be seen in a signal:
that is its purpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hfkd.rows import DenseRows, TopKRows

DISTRIBUTION = "distribution"
"""The teacher's distribution over the next token, for each supervised token."""

STATES = "states"
"""The teacher's hidden states of some layers (see `hfkd.states`), for each supervised token."""

NEEDS = frozenset({DISTRIBUTION, STATES})
"""Everything that a loss can ask a teacher for."""


@dataclass(frozen=True)
class TeacherSignal:
    """The teacher's word on N supervised tokens.

    Args:
        rows: Its distributions, in the order of the student's supervised tokens; None where nothing asked for them.
        states: [N, H] its hidden states of each layer that was asked for, in the same order; None where no loss reads
            states.
    """

    rows: DenseRows | TopKRows | None = None
    states: Mapping[int, Tensor] | None = None
