"""Reads a recipe: a YAML file and `section.key=value` overrides become a `Recipe`, or a `RecipeError` with all faults.

Builds nothing: no model, no tokenizer and no data file is opened here (`hfkd.run.build` and `hfkd.run` do that). A
path in `data` or `evaluation` that is relative is looked for beside the recipe first and then in the working
directory; for a path given as an override it is the other way round. Output folders and models are relative to the
working directory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from hfkd.recipe.adapters import expand, expansion_faults
from hfkd.recipe.checks import find_faults
from hfkd.recipe.schema import Recipe
from hfkd.recipe.source import RecipeError, apply_overrides, explain, read_yaml, resolve_paths

__all__ = ["Recipe", "RecipeError", "expand", "load_recipe"]


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, announce: Callable[[Recipe], None] | None = None
) -> Recipe:
    """Read a recipe and refuse it, with every fault in one message, before anything is loaded.

    Args:
        path: A YAML file.
        overrides: `section.key=value`, applied in order; the value is read as YAML, a list is entered by index
            (`loss.terms.0.weight=2`), and a section that the file leaves out is created.
        announce: Is given the recipe before anything that it names is imported (`hfkd.recipe.own_code`).

    Returns:
        The recipe with its defaults filled in; `training.output_dir` is `outputs/<name of the file>` when not given.

    Raises:
        RecipeError: The file is missing or no YAML, a key is unknown, a value is wrong, or a combination is
        impossible.
    """
    path = Path(path)
    tree = read_yaml(path)
    resolve_paths(tree, [path.parent, Path.cwd()])
    apply_overrides(tree, overrides)
    resolve_paths(tree, [Path.cwd(), path.parent])
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(path, explain(error, Recipe)) from None
    recipe.training.setdefault("output_dir", f"outputs/{path.stem}")
    if announce is not None:
        announce(recipe)
    faults = expansion_faults(recipe) if recipe.adapters else find_faults(recipe)
    if faults:
        raise RecipeError(path, faults)
    return recipe
