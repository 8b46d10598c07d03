"""`hfkd push`: send what a run left to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfkd.cli.errors import user_errors


def push(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the hub; made where it isn't there.")],
    public: Annotated[bool, typer.Option("--public", help="Everybody may read it; private by default.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Adapter and base as one whole model.")] = False,
    base: Annotated[
        str | None, typer.Option("--base", help="The hub's id of the adapter's base, where that is a folder here.")
    ] = None,
    base_repo: Annotated[
        str | None, typer.Option("--base-repo", help="owner/name for a base that was cut out (REPO_ID-base).")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Also send this teacher's cache, as a data set.")
    ] = None,
    cache_repo: Annotated[
        str | None, typer.Option("--cache-repo", help="owner/name of that data set (REPO_ID-cache).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and their sizes; send nothing.")] = False,
    message: Annotated[str | None, typer.Option("--message", help="Of the commit.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="A branch; made where it isn't there.")] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Send RUN's weights, tokenizer, card, records and pictures to REPO_ID, in one commit. Nothing else is sent."""
    with user_errors(traceback):
        if cache_repo is not None and cache is None:
            raise ValueError("--cache-repo names the data set of a cache; say with --cache which folder it is")

        from hfkd.hub import push as send_run

        if merged:
            from hfkd.cli.quiet import quiet_libraries

            quiet_libraries()
        send_run(
            run,
            repo_id,
            private=not public,
            merged=merged,
            base=base,
            base_repo=base_repo,
            cache=cache,
            cache_repo=cache_repo,
            dry_run=dry_run,
            revision=revision,
            message=message,
        )
