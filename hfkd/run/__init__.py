"""Running a recipe: from its sections to objects, through every stage, to the files that are written."""

from __future__ import annotations

from hfkd.run.conduct import RunResult, run_recipe
from hfkd.run.evaluation import evaluate_recipe

__all__ = ["RunResult", "evaluate_recipe", "run_recipe"]
