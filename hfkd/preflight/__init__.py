"""What can be known of a run before it is started: `hfkd check`. Minutes before hours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfkd.preflight.findings import Finding, exit_code

if TYPE_CHECKING:
    from hfkd.preflight.check import check_recipe

__all__ = ["Finding", "check_recipe", "exit_code"]


def __getattr__(name: str) -> Any:
    """`check_recipe` is imported when it is first asked for: it needs everything that a run needs."""
    if name == "check_recipe":
        from hfkd.preflight.check import check_recipe

        return check_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
