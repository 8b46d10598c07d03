"""The last line of a card: a digest of all that stands above it, by which a later writing knows whether a person has
changed anything.
"""

from __future__ import annotations

import hashlib
import re

_MARK = re.compile(r"\n<!-- hfkd card sha256:(?P<digest>[0-9a-f]{64}) -->\s*\Z")


def marked(card: str) -> str:
    """A card with its digest."""
    return f"{card}\n<!-- hfkd card sha256:{_digest(card)} -->\n"


def is_untouched(card: str) -> bool:
    """Whether a card is as it was written; one without a digest was written by somebody else."""
    card = card.replace("\r\n", "\n")
    found = _MARK.search(card)
    return found is not None and _digest(card[: found.start()]) == found["digest"]


def _digest(card: str) -> str:
    return hashlib.sha256(card.rstrip().encode("utf-8")).hexdigest()
