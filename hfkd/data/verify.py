"""Is a text right? A verifier gives a row and a text a number from 0 to 1: a reward, a filter, a label.

Knows rows and texts; how texts come about, and what a reward is good for, is known elsewhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from numbers import Real
from typing import Any

from hfkd.data.messages import prompt_key
from hfkd.errors import VerifierError
from hfkd.named import import_function

Verifier = Callable[[Mapping[str, Any], str], float]
"""Of a row and a text; 1 is right, 0 is wrong, between them is partly right."""


def as_verifier(verifier: str | Verifier) -> Verifier:
    """A verifier by its name, made safe: what it raises, and what is no number from 0 to 1, becomes a `VerifierError`.

    Args:
        verifier: `exact` (the stripped text is the row's `answer`), `contains` (the answer stands in the text),
            `reasoning_gym` (the checker of the task that the row comes from), `package.module:function`, or a
            function of a row and a text.

    Raises:
        ValueError: There is no such verifier.
    """
    if callable(verifier):
        return _checked(verifier, getattr(verifier, "__qualname__", repr(verifier)))
    if verifier in VERIFIERS:
        return _checked(VERIFIERS[verifier], verifier)
    if isinstance(verifier, str) and ":" in verifier:
        return _checked(import_function(verifier, "verifier"), verifier)
    raise ValueError(
        f"verifier is {verifier!r}; expected one of {', '.join(VERIFIERS)}, or package.module:function of a row and a "
        "text"
    )


def exact(row: Mapping[str, Any], text: str) -> float:
    """1 where the stripped text is the row's answer, whatever the case."""
    return float(text.strip().casefold() == _answer(row).casefold())


def contains(row: Mapping[str, Any], text: str) -> float:
    """1 where the row's answer stands in the text, whatever the case, and not as a part of a longer word or number."""
    answer = re.escape(_answer(row).casefold())
    return float(re.search(rf"(?<!\w){answer}(?!\w)", text.casefold()) is not None)


def reasoning_gym(row: Mapping[str, Any], text: str) -> float:
    """What the checker of the row's reasoning-gym task says of the stripped text; part marks too."""
    if not row.get("verification"):
        raise ValueError(
            "the row has no `verification`; load it with path: reasoning_gym:<task>, of a task whose checker can read "
            "what is kept of it (those of arc_agi and rearc can't)"
        )
    metadata = json.loads(row["verification"])
    entry = {"question": row["prompt"], "answer": _answer(row), "metadata": metadata}
    return float(_checker(metadata["source_dataset"])(text.strip(), entry))


VERIFIERS: dict[str, Verifier] = {"exact": exact, "contains": contains, "reasoning_gym": reasoning_gym}
"""The built-in ones by name."""


@cache
def _checker(task: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym.factory import get_score_answer_fn

    return get_score_answer_fn(task)


def _answer(row: Mapping[str, Any]) -> str:
    answer = row.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError("the row has no `answer` to hold the text against")
    return answer.strip()


def _checked(verifier: Verifier, name: str) -> Verifier:
    def checked(row: Mapping[str, Any], text: str) -> float:
        try:
            value = verifier(row, text)
        except Exception as error:
            raise VerifierError(
                f"The verifier {name} raised {type(error).__name__}: {error}. The row: {prompt_key(row)[:80]!r}; the "
                f"text: {text[:80]!r}. Mend the verifier, or take such rows out."
            ) from error
        number = isinstance(value, Real) or (hasattr(value, "item") and getattr(value, "ndim", 1) == 0)
        if not number or not math.isfinite(value := float(value)) or not 0 <= value <= 1:
            raise VerifierError(
                f"The verifier {name} gave {value!r} for the text {text[:80]!r} of the row {prompt_key(row)[:80]!r}; "
                "expected a number from 0 (wrong) to 1 (right)."
            )
        return value

    return checked
