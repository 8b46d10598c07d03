"""Data: load rows, write prompts, tokenize two views of each, collate them, and deal rows out.

It knows no model, no teacher and no loss.
"""

from __future__ import annotations

from hfkd.data.collate import DistillationCollator
from hfkd.data.load import Source, load_rows
from hfkd.data.prompts import PromptBuilder, PromptStyle
from hfkd.data.select import LeakageError, Splits, check_leakage, split_rows, visited
from hfkd.data.sources import DataError
from hfkd.data.tokenize import Encoded, encode
from hfkd.data.views import DistillationDataset, Example, shown_demonstrations, teacher_prompts

__all__ = [
    "DataError",
    "DistillationCollator",
    "DistillationDataset",
    "Encoded",
    "Example",
    "LeakageError",
    "PromptBuilder",
    "PromptStyle",
    "Source",
    "Splits",
    "check_leakage",
    "encode",
    "load_rows",
    "shown_demonstrations",
    "split_rows",
    "teacher_prompts",
    "visited",
]
