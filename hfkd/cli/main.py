"""The `hfkd` command: its subcommands, its version, and how a user's error is shown.

Imports nothing heavy: torch and the models come in when a command runs, so `hfkd --help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from hfkd.cli.cache import cache
from hfkd.cli.card import card
from hfkd.cli.check import check
from hfkd.cli.compare import compare
from hfkd.cli.evaluate import evaluate
from hfkd.cli.label import label
from hfkd.cli.push import push
from hfkd.cli.reason import reason
from hfkd.cli.train import train

app = typer.Typer(
    name="hfkd",
    help="Knowledge distillation of causal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"hfkd {version('hfkd')}")
        except PackageNotFoundError:
            typer.echo("hfkd (not installed)")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Knowledge distillation of causal language models."""


for command in (check, train, cache, label, evaluate, reason, compare, card, push):
    app.command()(command)
