"""How the commands read a recipe: before any code that it brings with it is imported, the user is told of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hfkd.cli.errors import visible

if TYPE_CHECKING:
    from hfkd.recipe import Recipe


def read_recipe(path: Path, overrides: Sequence[str] | None) -> Recipe:
    """The recipe with its overrides; the first process says what code it brings.

    Raises:
        RecipeError: See `hfkd.recipe.load_recipe`.
    """
    from hfkd.recipe import load_recipe

    return load_recipe(path, overrides or [], announce=_announce)


def _announce(recipe: Recipe) -> None:
    from hfkd.recipe.own_code import code_lines

    if os.environ.get("RANK", "0") != "0":
        return
    for line in code_lines(recipe):
        typer.secho(visible(line), fg=typer.colors.YELLOW, err=True)
