"""A page of docs/ of which a script writes a part: renewed, or only compared with what it should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path


def write_or_compare(path: Path, renewed: Callable[[str], str], command: str, arguments: Sequence[str]) -> int:
    """Write the page as it should be now, or with `--check` among the arguments say whether it is.

    Args:
        path: Of the page, in docs/.
        renewed: The page as it should be, from the page as it is.
        command: What renews it, for the message.
        arguments: Of the command line.

    Returns:
        1 where the page is out of date and stays so, else 0.
    """
    page = path.read_text("utf-8")
    fresh = renewed(page)
    if "--check" in arguments:
        state = "up to date" if fresh == page else f"out of date: run {command}"
        print(f"docs/{path.name} is {state}")
        return int(fresh != page)
    path.write_text(fresh, "utf-8")
    return 0
