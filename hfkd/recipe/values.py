"""Values of YAML as the constructor or the field that takes them wants them."""

from __future__ import annotations

import typing
from typing import Any


def plain_value(hint: Any, value: Any) -> Any:
    """A value as its field's type wants it: YAML reads `2e-4` as a text, which is a number here.

    Raises:
        ValueError: The value can't be of the type; the message says what was expected.
    """
    kinds = set(typing.get_args(hint)) or {hint}
    others = kinds - {int, float, bool, str, type(None)}
    if value is None or (others and not (kinds & {int, float} and isinstance(value, int | float | str))):
        return value  # lists, mappings, enumerations: their owner checks them itself
    if isinstance(value, bool):
        return _or_refuse(value, bool in kinds, "a number" if kinds & {int, float} else "a text")
    if isinstance(value, int | float):
        whole = isinstance(value, int) or float in kinds
        return _or_refuse(
            value, bool(kinds & {int, float}) and whole, "a whole number" if int in kinds else _wanted(kinds)
        )
    if isinstance(value, str) and str not in kinds and float in kinds:
        try:
            return float(value)
        except ValueError:
            raise ValueError("a number") from None
    return _or_refuse(value, isinstance(value, str) and str in kinds, _wanted(kinds))


def _or_refuse(value: Any, fits: bool, expected: str) -> Any:
    if not fits:
        raise ValueError(expected)
    return value


def _wanted(kinds: set[Any]) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return " or ".join(text for kind, text in names.items() if kind in kinds)
