"""The code that a recipe brings with it: names that will be imported, and repositories whose code may run.

Read off the keys alone, so that a user can be told before any of it runs. `hfkd.named` imports; nothing does here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hfkd.named import OWN_NAME
from hfkd.recipe.adapters import drafts
from hfkd.recipe.schema import Recipe


def own_code(recipe: Recipe) -> dict[str, str]:
    """Every `package.module:Name` that this recipe would have imported, by its key."""
    return {key: name for key, name in _places(recipe) if isinstance(name, str) and ":" in name}


def trusted_code(recipe: Recipe) -> dict[str, str]:
    """The models whose repositories may run their code, by the key that says so."""
    teachers = {"teacher": recipe.teacher}
    teachers |= {f"teacher.members.{name}": member for name, member in recipe.teacher.members.items()}
    found = {f"{key}.trust_remote_code": one.model for key, one in teachers.items() if one.trust_remote_code}
    if recipe.student.trust_remote_code:
        found = {"student.trust_remote_code": recipe.student.origin, **found}
    for name, one in drafts(recipe).items():
        found |= {
            f"adapters.{name}.{key}": model for key, model in trusted_code(one).items() if found.get(key) != model
        }
    return {key: model or "no model" for key, model in found.items()}


def code_lines(recipe: Recipe) -> list[str]:
    """What a user is told of both, a line for each name under a line that says what it is; none for a recipe of plain
    values.
    """
    lines = []
    own = {key: name for key, name in own_code(recipe).items() if not name.startswith("hfkd.")}
    if own:
        lines += ["This recipe imports code of its own:", *(f"  {name} ({key})" for key, name in own.items())]
    if trusted := trusted_code(recipe):
        lines.append("This recipe lets the code of model repositories run:")
        lines += [f"  {model} ({key})" for key, model in trusted.items()]
    return lines


def _places(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Every key that can hold a name that is imported, with what it holds."""
    yield "teacher.kind", recipe.teacher.kind
    for name, member in recipe.teacher.members.items():
        yield f"teacher.members.{name}.kind", member.kind
    for number, term in enumerate(recipe.loss.terms):
        yield f"loss.terms.{number}.kind", term.kind
        for name, value in (term.model_extra or {}).items():
            yield f"loss.terms.{number}.{name}", value  # a loss may take a function by its name, `spans` for one
    data = recipe.data
    yield "data.token_weights", data.token_weights
    for key, part in data.parts.items():
        yield f"{key}.kind", part.kind
        own = {name: value for name, value in (part.model_extra or {}).items() if name != "path"}  # rows, no code
        yield from _texts(own, key)
    yield "data.prompt.builder", data.prompt.builder
    yield "data.train.format", data.train.format
    yield "data.demonstrations.format", data.demonstrations.format
    if recipe.reinforcement is not None:
        yield "reinforcement.verifier", recipe.reinforcement.verifier
    if recipe.evaluation is not None:
        yield "evaluation.format", recipe.evaluation.format
        for number, other in enumerate(recipe.evaluation.forgetting):
            yield f"evaluation.forgetting.{number}.format", other.format
    for name, section in recipe.adapters.items():
        yield from _texts(section.model_dump(), f"adapters.{name}")


def _texts(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every text below, by its dotted key, that has the form of a name that is imported."""
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(part, f"{key}.{name}")
    elif isinstance(value, str) and OWN_NAME.match(value):
        yield key, value
