"""Several named adapters on one base, and what they find together: loading, writing by turns, the agreement loop."""

from __future__ import annotations

from hfkd.adapters.loading import adapter_names, load_adapters, using
from hfkd.adapters.loop import Outcome, Round, consistency_loop, summary
from hfkd.adapters.reasoners import Reasoners

__all__ = [
    "Outcome",
    "Reasoners",
    "Round",
    "adapter_names",
    "consistency_loop",
    "load_adapters",
    "summary",
    "using",
]
