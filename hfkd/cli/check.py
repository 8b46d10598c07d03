"""`hfkd check`: what can be known of a recipe's run before it is started. It trains nothing and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfkd.cli.errors import user_errors
from hfkd.cli.reading import read_recipe


def check(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as loss.chunk_size=64.")
    ] = None,
    world_size: Annotated[
        int | None, typer.Option("--world-size", min=1, help="Memory and duration of a run of so many processes.")
    ] = None,
    items: Annotated[int, typer.Option("--items", min=1, help="Questions that teacher and student are asked.")] = 32,
    json: Annotated[Path | None, typer.Option("--json", help="Write the findings to this file.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Count a warning as an error.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Look at RECIPE before it is run: data, tokens, memory, what there is to learn, time. Exit code 1 on errors."""
    with user_errors(traceback):
        loaded = read_recipe(recipe, overrides)
        if json is not None:
            _check_file(json)  # now, and not after minutes of checks

        from hfkd.cli.quiet import quiet_libraries
        from hfkd.preflight import check_recipe, exit_code
        from hfkd.preflight.findings import write_findings
        from hfkd.recipe import expand

        quiet_libraries()
        findings = [
            finding
            for one in expand(loaded).values()  # several adapters are several runs
            for finding in check_recipe(one, processes=world_size, items=items)
        ]
        if json is not None:
            write_findings(json, findings, recipe)
        code = exit_code(findings, strict)
    if code:
        raise typer.Exit(code)


def _check_file(path: Path) -> None:
    """Refuse a file for the findings that can't be written.

    Raises:
        OSError: It is a folder, or the one that it would lie in can't be written into.
    """
    if path.is_dir():
        raise IsADirectoryError(f"--json: {path} is a folder; expected a file to write the findings to")
    from hfkd.files import try_folder

    try:
        try_folder(path.absolute().parent)
    except OSError as error:
        raise OSError(
            f"--json: {path} can't be written ({error.strerror or error}); give a file in a folder of yours"
        ) from error
