"""How a model was asked, in short keys, so that two runs that were asked in other ways aren't compared without a word.

Takes plain data of a recipe; knows no model and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SETTINGS = ("tolerance", "max_new_tokens", "reshuffle", "seed")
_SHOWN_ONLY = ("reshuffle", "evaluation.seed", "demonstrations")  # of no matter where no demonstrations are shown
_LONGEST = 60


def way_of_asking(
    prompt: Mapping[str, Any], evaluation: Mapping[str, Any], extract: str, demonstrations: str | None = None
) -> dict[str, Any]:
    """What decides the answers besides the model and the items.

    Args:
        prompt: The recipe's `data.prompt`.
        evaluation: The recipe's `evaluation`.
        extract: How the short answer is read out of a text.
        demonstrations: The SHA-256 of the demonstrations, where it is known.

    Returns:
        Plain values by the keys of a recipe, and `demonstrations`; what isn't known has none.
    """
    found = {f"data.prompt.{name}": value for name, value in prompt.items()}
    found |= {f"evaluation.{name}": evaluation[name] for name in _SETTINGS if name in evaluation}
    found["evaluation.extract"] = extract
    return found if demonstrations is None else {**found, "demonstrations": demonstrations}


def differences(first: Mapping[str, Any], second: Mapping[str, Any], shown: bool) -> list[str]:
    """Where two ways of asking differ, of the keys that both know, each with the two values.

    Args:
        first: Of `way_of_asking`.
        second: The same of another run.
        shown: Whether demonstrations were shown.
    """
    keys = [key for key in first if key in second and (shown or not key.endswith(_SHOWN_ONLY))]
    return [f"{key} is {_short(first[key])} and {_short(second[key])}" for key in keys if first[key] != second[key]]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
