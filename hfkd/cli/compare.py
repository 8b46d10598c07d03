"""`hfkd compare`: runs beside each other, with the interval of each difference. It loads no model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfkd.cli.errors import user_errors


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Folders of runs, predictions.jsonl, or files of hfkd evaluate --json. First: base."
        ),
    ],
    stage: Annotated[
        str | None, typer.Option("--stage", help="Whose answers: before, after, gold, teacher (after).")
    ] = None,
    draws: Annotated[int, typer.Option("--draws", min=100, help="Of the bootstrap.")] = 10_000,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the comparison to this file.")] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Compare each RUN with the first one, on the items that both were asked; of one RUN, what training changed."""
    with user_errors(traceback):
        from hfkd.cli.quiet import quiet_libraries
        from hfkd.eval.comparison.compare import compare_sides
        from hfkd.eval.comparison.sides import load_sides
        from hfkd.eval.comparison.tables import print_comparison
        from hfkd.report.written import write_report

        quiet_libraries()
        found = compare_sides(load_sides(runs, stage), draws=draws, seed=seed)
        print_comparison(found)
        if json is not None:
            write_report(json, {"kind": "hfkd comparison", "schema": 1, "draws": draws, "seed": seed, **found})
