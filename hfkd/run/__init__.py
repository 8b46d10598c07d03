"""Running a recipe: from its sections to objects, through every stage, to the files that are written."""

from __future__ import annotations

from hfkd.run.adapters import AdapterRuns
from hfkd.run.conduct import RunResult
from hfkd.run.evaluation import evaluate_recipe
from hfkd.run.start import run_recipe

__all__ = ["AdapterRuns", "RunResult", "evaluate_recipe", "run_recipe"]
