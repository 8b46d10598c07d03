"""`hfkd cache`: run a recipe's teacher once and keep what it says, so that training needs it no more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from hfkd.cli.errors import user_errors
from hfkd.cli.reading import read_recipe

# Which options of the command belong to which codec.
_OF = {"k": ("topk",), "rounds": ("sampled",), "power": ("sampled",), "seed": ("sampled",), "dtype": ("hidden",)}
_OF["compact"] = ("topk", "sampled")


def cache(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as teacher.revision=main.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The folder of the cache; name it in teacher.cache.")] = ...,
    codec: Annotated[str, typer.Option("--codec", help="topk, sampled or hidden (exact).")] = "topk",
    k: Annotated[int | None, typer.Option("--k", help="topk: likeliest ids of each token (64).")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="sampled: draws for each token (50).")] = None,
    power: Annotated[float | None, typer.Option("--power", help="sampled: power of the proposal (1.0).")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="sampled: seed of the draws (0).")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="hidden: model, float32, bfloat16 or float16 (model).")
    ] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="topk, sampled: fewer bits, see docs/caching.md.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="topk, sampled: that of the recipe's losses by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts that are run together.")] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the cache in the folder first.")] = False,
    push: Annotated[str | None, typer.Option("--push", help="Send it to the hub, as a data set owner/name.")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: a new repository is public.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Run RECIPE's teacher over its training texts and keep its distributions. Run it again where it was killed."""
    given = {"k": k, "rounds": rounds, "power": power, "seed": seed, "dtype": dtype, "compact": compact or None}
    with user_errors(traceback):
        settings = _settings(codec, given)
        loaded = read_recipe(recipe, overrides)

        from hfkd.cache import make_codec
        from hfkd.cli.quiet import quiet_libraries
        from hfkd.hub import check_cache_push, push_cache
        from hfkd.run.caching import build_cache

        quiet_libraries()
        if push is not None and _is_first():
            check_cache_push(push, private=not public)  # before hours of building
        made = make_codec(codec, **settings)
        build_cache(loaded, out, made, temperature=temperature, batch_size=batch_size, overwrite=overwrite)
        if push is not None and _is_first():
            push_cache(out, push, private=not public, say=typer.echo)


def _settings(codec: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given.

    Raises:
        ValueError: One of them is another codec's.
    """
    settings = {name: value for name, value in given.items() if value is not None}
    for name in settings:
        if codec not in _OF[name]:
            raise ValueError(f"--{name} belongs to --codec {' or '.join(_OF[name])}, and --codec is {codec}")
    return settings


def _is_first() -> bool:
    """Whether this process is the first of those that were started together; asks no device for it."""
    return os.environ.get("RANK", "0") == "0"
