"""Where a recipe begins: as one run, or as one for each of its adapters."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from hfkd.recipe.schema import Recipe
from hfkd.run import conduct
from hfkd.run.adapters import AdapterRuns, run_adapters
from hfkd.run.conduct import RunResult


def run_recipe(
    recipe: Recipe, *, console: Console | None = None, command: Sequence[str] = ()
) -> RunResult | AdapterRuns:
    """Run a recipe from the first check to the last file.

    Args:
        recipe: From `load_recipe`.
        console: Where the first process prints; None prints to the terminal.
        command: The command line, for the record; secrets in it are masked.

    Returns:
        The report and the record, as written; of several adapters those of each.

    Raises:
        ValueError: Something in the recipe or the data can't work, or the output folder holds another run.
        OSError: A file is missing or damaged.
    """
    if recipe.adapters:
        return run_adapters(recipe, run_recipe, console=console, command=command)
    return conduct.run_recipe(recipe, console=console, command=command)
