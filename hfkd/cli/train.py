"""`hfkd train`: run a recipe from start to end. Knows only how to read the command line; `hfkd.run` does the work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hfkd.cli.errors import user_errors
from hfkd.cli.reading import read_recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, YAML or JSON.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as training.max_steps=30.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in the output folder first.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Train a student as RECIPE says, with its keys changed by KEY=VALUE."""
    with user_errors(traceback):
        policy = run_policy(resume, overwrite)
        loaded = read_recipe(recipe, [*(overrides or []), *policy])

        from hfkd.cli.quiet import quiet_libraries
        from hfkd.run import run_recipe

        quiet_libraries()
        run_recipe(loaded, command=sys.argv)


def run_policy(resume: bool, overwrite: bool) -> list[str]:
    """The override that the two flags stand for.

    Raises:
        ValueError: Both were given.
    """
    if resume and overwrite:
        raise ValueError(
            "--resume continues the run in the output folder and --overwrite deletes it; give one of them"
        )
    return ["training.run_policy=resume"] if resume else ["training.run_policy=overwrite"] if overwrite else []
