"""`hfkd label`: have a teacher behind an address label rows, so that any recipe can train on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfkd.cli.errors import user_errors, visible


def label(
    plan: Annotated[Path, typer.Argument(help="A YAML file: endpoint, data, template, filters.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as endpoint.parallel=8.")
    ] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Ask PLAN's teacher, an OpenAI-compatible endpoint, about its rows. Run it again where it was killed."""
    with user_errors(traceback):
        from hfkd.labels.plan import load_plan, own_code

        loaded = load_plan(plan, overrides or [])
        if own := own_code(loaded):
            _warn("This plan imports code of its own:")
            for key, name in own.items():
                _warn(f"  {name} ({key})")

        from hfkd.cli.quiet import quiet_libraries
        from hfkd.labels.labelling import ROWS_NAME, label_rows

        quiet_libraries()
        summary = label_rows(loaded, say=lambda line: typer.echo(f"[label] {visible(line)}"))
        rows, rejected = summary["rows"], summary["rows"]["rejected"]
        left_out = ", ".join(f"{count} {kind}" for kind, count in rejected.items()) or "none"
        typer.echo(f"{rows['labelled']} of {rows['read']} rows are labelled; left out: {left_out}")
        if summary["cost"] is not None:
            typer.echo(f"cost so far: {summary['cost']:.4f}")
        for warning in summary["warnings"]:
            _warn(f"Warning: {warning}")
        typer.echo(f"{rows['written']} rows to learn: data.train.path={Path(loaded.output_dir) / ROWS_NAME}")


def _warn(line: str) -> None:
    typer.secho(visible(line), fg=typer.colors.YELLOW, err=True)
