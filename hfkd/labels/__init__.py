"""Labels and rationales of a teacher that is only an address: asked once, kept, filtered, and written as rows.

The teacher answers in texts, so no distribution is had of it, and nothing of a training is known here: what comes out
is a file that any recipe reads as its `data.train`.
"""

from __future__ import annotations

from hfkd.labels.filters import FILTERS, Filter
from hfkd.labels.labelling import label_rows
from hfkd.labels.plan import LabelPlan, load_plan
from hfkd.labels.spans import SpanScores, span_f1, span_scores
from hfkd.labels.templates import Answer, FormatError, Template

__all__ = [
    "FILTERS",
    "Answer",
    "Filter",
    "FormatError",
    "LabelPlan",
    "SpanScores",
    "Template",
    "label_rows",
    "load_plan",
    "span_f1",
    "span_scores",
]
