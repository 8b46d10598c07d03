"""Things of the user's own that a recipe names: `package.module:Name`.

Nothing is imported unless it is asked for by name.
"""

from __future__ import annotations

import importlib
from typing import Any


def import_named(name: str, key: str) -> Any:
    """What `package.module:Name` names.

    Args:
        name: The two parts.
        key: Who asks, for messages.

    Raises:
        ValueError: The module can't be imported, or has no such name.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(
            f"{key}: {module_name} can't be imported ({error}); expected package.module:Name; install it or put its "
            "folder on PYTHONPATH"
        ) from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{key}: {module_name} has no {attribute}; expected package.module:Name")
        found = getattr(found, part)
    return found
