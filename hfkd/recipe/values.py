"""Values of YAML as the constructor or the field that takes them wants them."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

from hfkd.recipe.source import near, shown


def plain_value(hint: Any, value: Any) -> Any:
    """A value as its field's type wants it: YAML reads `2e-4` as a text, which is a number here.

    Raises:
        ValueError: The value can't be of the type; the message says what was expected.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = set(typing.get_args(hint)) if union else {hint}
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


def argument_faults(key: str, cls: type, given: dict[str, Any]) -> Iterator[str]:
    """Unknown names, values of a wrong type and missing ones; numbers that YAML reads as texts are converted.

    Args:
        key: Of the section, for messages.
        cls: Whose constructor takes them.
        given: By name; converted in place.
    """
    parameters = {} if cls.__init__ is object.__init__ else inspect.signature(cls).parameters
    hints = typing.get_type_hints(cls.__init__)
    for name, value in given.items():
        if name not in parameters:
            known = ["kind", *parameters]
            yield f"{key}.{name}: unknown key{near(name, known)} (known here: {', '.join(known)})"
            continue
        try:
            given[name] = plain_value(hints.get(name), value)
        except ValueError as error:
            yield f"{key}.{name}: got {shown(value)} ({type(value).__name__}); expected {error}"
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD and name not in given:
            yield f"{key}.{name}: is required and is not given"
