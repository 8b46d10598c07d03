"""What is changed of a step's batches before they are learned."""

from __future__ import annotations

from hfkd.revision.base import Reviser

REVISERS: dict[str, str] = {}
"""Recipe keys of the revisers, and where their classes are: `module:Class`, imported when asked for."""

__all__ = ["REVISERS", "Reviser"]
