"""How the commands show an error that a user can mend: one red message, exit code 2, no traceback unless asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def user_errors(traceback: bool) -> Iterator[None]:
    """Turn a user's error (`ValueError`, `OSError`, a loss that is no number) into a message and exit code 2.

    Args:
        traceback: Let the error through with its traceback.
    """
    try:
        yield
    except Exception as error:
        _hide_secrets(error)
        if traceback or not _is_users(error):
            raise
        typer.secho("\n".join(map(visible, f"Error: {error}".split("\n"))), fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None


def visible(line: str) -> str:
    """A line with its control characters written out: a terminal would obey them, and could wipe away other lines."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)


def _hide_secrets(error: BaseException | None) -> None:
    """Mask what looks like a secret in the message of an error and of those behind it: it will be copied somewhere."""
    from hfkd.masking import mask_secrets

    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.args = tuple(mask_secrets(part) if isinstance(part, str) else part for part in error.args)
        error = error.__cause__ or error.__context__


def _is_users(error: Exception) -> bool:
    if isinstance(error, ValueError | OSError):
        return True
    from hfkd.errors import NonFiniteGradient, NonFiniteLoss

    return isinstance(error, NonFiniteLoss | NonFiniteGradient)
