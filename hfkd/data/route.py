"""Which of several teachers a row has: a column of the rows names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Route = tuple[str, Sequence[str]]
"""A column of the rows, and the names of teachers that it may hold."""


def check_route(route: Route | None) -> tuple[str, tuple[str, ...]] | None:
    """The route in one form.

    Raises:
        ValueError: It is no column with names, or has a name twice.
    """
    if route is None:
        return None
    column, names = route
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"route is {route!r}; expected a column and the names of the teachers, each once")
    return column, tuple(names)


def route_of(route: tuple[str, Sequence[str]], row: Mapping[str, Any], called: str | None = None) -> int:
    """The place of a row's teacher among the names.

    Args:
        route: The column, and the names of the teachers.
        row: As it came.
        called: The column's name in messages, where the file has another one.

    Raises:
        ValueError: The column is missing or empty, or holds a name that no teacher has.
    """
    column, names = route
    called = called or column
    known = f"known teachers are {', '.join(names)}"
    if column not in row:
        raise ValueError(f"it has no column {called!r}, which names its teacher, but {sorted(row)}; {known}")
    found = row[column]
    if found is None or found == "":
        raise ValueError(f"its column {called!r} is empty, so it has no teacher; {known}")
    if found not in names:
        raise ValueError(f"its column {called!r} names the teacher {found!r}; {known}")
    return list(names).index(found)
