"""`hfkd evaluate`: the k-shot accuracy of a recipe's student, with or without an adapter. It trains nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfkd.cli.errors import user_errors
from hfkd.cli.reading import read_recipe


def evaluate(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe with an evaluation section.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as evaluation.size=24.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="A trained adapter, or the folder of a run.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Ask RECIPE's student its evaluation items, with each number of demonstrations in evaluation.shots."""
    with user_errors(traceback):
        loaded = read_recipe(recipe, overrides)

        from hfkd.cli.quiet import quiet_libraries
        from hfkd.run.evaluation import evaluate_recipe

        quiet_libraries()
        evaluate_recipe(loaded, adapter=adapter, json_path=json)
