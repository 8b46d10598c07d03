"""Values out of files that anybody may have written, changed or cut: of the expected kind, or the default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def section(data: Any, path: str = "") -> Mapping[str, Any]:
    """The mapping under a dotted path; empty where there is none."""
    for key in path.split(".") if path else ():
        data = data.get(key) if isinstance(data, Mapping) else None
    return data if isinstance(data, Mapping) else {}


def value(data: Any, path: str) -> Any:
    """Whatever stands under a dotted path; None where nothing does."""
    before, _, key = path.rpartition(".")
    return section(data, before).get(key)


def text(data: Any, path: str, default: str = "") -> str:
    """The text under a dotted path."""
    found = value(data, path)
    return found if isinstance(found, str) and found.strip() else default


def number(data: Any, path: str) -> float | None:
    """The finite number under a dotted path."""
    found = value(data, path)
    plain = isinstance(found, int | float) and not isinstance(found, bool) and abs(found) < 1e300
    return found if plain and math.isfinite(found) else None


def count(data: Any, path: str, default: int = 0) -> int:
    """The whole number under a dotted path."""
    found = number(data, path)
    return found if isinstance(found, int) else default


def entries(data: Any, path: str) -> list[Mapping[str, Any]]:
    """The mappings in the list under a dotted path; other things in it are passed over."""
    found = value(data, path)
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def pair(data: Any, path: str) -> tuple[float, float] | None:
    """The two finite numbers in the list under a dotted path."""
    found = value(data, path)
    if not isinstance(found, list | tuple) or len(found) != 2:
        return None
    low, high = (number({"one": one}, "one") for one in found)
    return None if low is None or high is None else (low, high)
