"""`hfkd card`: the model card of a run, from the files in its folder. It loads no model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfkd.cli.errors import user_errors, visible


def card(
    run: Annotated[Path, typer.Argument(help="The output folder of a run.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where the card goes (RUN/README.md).")] = None,
    html: Annotated[bool, typer.Option("--html", help="Write RUN/report.html too, one file for a browser.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write over a card that was changed by hand.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Write the model card of RUN, and say what it lacks."""
    with user_errors(traceback):
        from hfkd.card import build_card, read_run, write_card

        found = read_run(run)
        text = build_card(found.run, found.report, files=found.files, missing=found.missing)
        written = [write_card(out or run / "README.md", text, overwrite=overwrite)]
        if html:
            written.append(_write_page(run, found.run, found.report, text))
        for path in written:
            typer.echo(f"Written     {visible(str(path))}")
        for line in found.missing:
            typer.secho(f"Missing     {visible(line)}", fg=typer.colors.YELLOW)


def _write_page(folder: Path, run: dict, report: dict, text: str) -> Path:
    from hfkd.files import write_whole
    from hfkd.report.page import build_page

    pictures = {f"plots/{path.name}": path.read_bytes() for path in sorted((folder / "plots").glob("*.png"))}
    return write_whole(folder / "report.html", build_page(run, report, pictures, text))
