"""Things of the user's own that a recipe names: `package.module:Name`.

Nothing is imported unless it is asked for by name, and nowhere else in the package is a name from a recipe imported.
Which keys of a recipe may hold such names, and how they are told to the user first, is `hfkd.recipe.own_code`.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

OWN_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*\Z")
"""The form of such a name; whatever has it where code may stand would be imported."""


def import_named(name: str, key: str) -> Any:
    """What `package.module:Name` names.

    Args:
        name: The two parts.
        key: Who asks, for messages.

    Raises:
        ValueError: It has no such form, the module can't be imported, or has no such name.
    """
    if not OWN_NAME.match(name):
        raise ValueError(f"{key}: got {name!r}; expected package.module:Name")
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


def import_function(name: str, key: str) -> Any:
    """The function, or anything that can be called, that `package.module:Name` names.

    Raises:
        ValueError: It can't be imported or can't be called.
    """
    found = import_named(name, key)
    if not callable(found):
        raise ValueError(f"{key}: {name} is {found!r}; expected a function")
    return found


def import_class(name: str, key: str, *bases: type) -> Any:
    """The class that `package.module:Name` names.

    Args:
        name: The two parts.
        key: Who asks, for messages.
        bases: It must be a subclass of one of them.

    Raises:
        ValueError: It can't be imported or is no such class.
    """
    found = import_named(name, key)
    if not (isinstance(found, type) and issubclass(found, bases)):
        wanted = " or ".join(f"{base.__module__.rpartition('.')[0]}.{base.__name__}" for base in bases)
        raise ValueError(f"{key}: {name} is {found!r}; expected a subclass of {wanted}")
    return found
