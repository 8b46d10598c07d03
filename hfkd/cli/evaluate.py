"""`hfkd evaluate`: what a recipe's student, or a finished run, can do. It trains nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfkd.cli.errors import user_errors
from hfkd.cli.reading import read_recipe

if TYPE_CHECKING:
    from hfkd.eval.harness import HarnessSettings


def evaluate(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe (YAML or JSON), or the folder of a run.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as evaluation.size=24.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="A trained adapter, or the folder of a LoRA run.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the untrained model, too.")] = False,
    fidelity: Annotated[bool, typer.Option("--fidelity", help="How near it is to the recipe's teacher.")] = False,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="Tasks of lm_eval: hellaswag,arc_easy. Needs the extra eval.")
    ] = None,
    lm_eval_limit: Annotated[
        int | None, typer.Option("--lm-eval-limit", min=1, help="So many documents of each task.")
    ] = None,
    lm_eval_shots: Annotated[
        int | None, typer.Option("--lm-eval-shots", min=0, help="Demonstrations, instead of each task's own.")
    ] = None,
    lm_eval_include: Annotated[
        Path | None, typer.Option("--lm-eval-include", help="A folder with tasks of your own, as YAML.")
    ] = None,
    as_found: Annotated[
        bool, typer.Option("--as-found", help="Of a RUN: take rows and model that are here, though it had others.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write each result here at once; what is here isn't run again.")
    ] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Ask RECIPE's student, or the model that a RUN trained, the recipe's evaluation items and what else is named."""
    with user_errors(traceback):
        folder = _run_folder(recipe, adapter)
        loaded = read_recipe(recipe if folder is None else folder / "recipe.yaml", overrides)

        from hfkd.cli.quiet import quiet_libraries
        from hfkd.run.evaluation import evaluate_recipe
        from hfkd.run.provenance import chosen_by

        quiet_libraries()
        evaluate_recipe(
            loaded,
            adapter=adapter,
            run_folder=folder,
            base=base,
            fidelity=fidelity,
            harness=_harness(lm_eval, lm_eval_limit, lm_eval_shots, lm_eval_include),
            json_path=json,
            chosen=chosen_by(overrides or (), everything=as_found),
        )


def _run_folder(path: Path, adapter: Path | None) -> Path | None:
    """The folder, if it is one of a run.

    Raises:
        ValueError: It is a folder without a recipe, or an adapter was given besides.
    """
    if not path.is_dir():
        return None
    if not (path / "recipe.yaml").is_file():
        raise ValueError(f"{path} has no recipe.yaml; expected the folder of a run, or a recipe")
    if adapter is not None:
        raise ValueError(
            f"--adapter names weights, and {path} is a run with its own; give its recipe.yaml, or no --adapter"
        )
    return path


def _harness(tasks: str | None, limit: int | None, shots: int | None, include: Path | None) -> HarnessSettings | None:
    """What is asked through lm_eval.

    Raises:
        ValueError: A setting was given, and no task.
    """
    from hfkd.eval.harness import HarnessSettings

    if tasks is None:
        given = {"--lm-eval-limit": limit, "--lm-eval-shots": shots, "--lm-eval-include": include}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} says how lm_eval's tasks are asked, and none is named; add --lm-eval TASKS")
        return None
    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    return HarnessSettings(names, limit, shots, include)
