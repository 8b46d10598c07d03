"""One recipe of several adapters as several recipes: one run for each, into a folder of its own.

What an adapter doesn't say of itself is the recipe's. Sections are merged key by key; a list, a plain value and a
section of another `kind` take the place of the one before. Trains nothing: `hfkd.run.adapters` runs them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from hfkd.recipe.checks import find_faults
from hfkd.recipe.schema import Recipe
from hfkd.recipe.source import RecipeError, explain, shown

_NAME = re.compile(r"[A-Za-z][\w-]*")
_PREFIX = "lora_"  # peft names an adapter's weights so, and takes a name that is a part of it for the prefix


def expand(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes that one recipe stands for.

    Args:
        recipe: From `load_recipe`.

    Returns:
        By the adapter's name its recipe, without adapters, whose output folder is called like the adapter; the recipe
        itself under the empty name where it has no adapters.

    Raises:
        RecipeError: One of them can't be run.
    """
    if not recipe.adapters:
        return {"": recipe}
    parts, faults = _drafts(recipe)
    faults = faults or _combined(parts)
    if faults:
        raise RecipeError("of several adapters", faults)
    return parts


def drafts(recipe: Recipe) -> dict[str, Recipe]:
    """As `expand`, before the recipes are looked at as wholes, and without those that aren't recipes."""
    return _drafts(recipe)[0]


def expansion_faults(recipe: Recipe) -> list[str]:
    """Every fault of a recipe with adapters, one line each; one that all adapters share is told once."""
    parts, faults = _drafts(recipe)
    return [*_section_faults(recipe), *faults, *_combined(parts)]


def refuse_adapters(recipe: Recipe) -> None:
    """Refuse to take a recipe of several adapters for one run.

    Raises:
        ValueError: It has adapters.
    """
    if recipe.adapters:
        folder = recipe.training.get("output_dir", "outputs")
        raise ValueError(
            f"this recipe trains several adapters ({', '.join(recipe.adapters)}), each as a run of its own; name one "
            f"of their folders or recipes, such as {folder}/{next(iter(recipe.adapters))}"
        )


def _drafts(recipe: Recipe) -> tuple[dict[str, Recipe], list[str]]:
    """The recipes of those adapters whose keys are right, and the faults of the others' keys."""
    whole = recipe.resolved()
    sections = whole.pop("adapters", {})
    found: dict[str, Recipe] = {}
    faults: list[str] = []
    for name, own in sections.items():
        tree = _merged(whole, own)
        _place(tree, name, own)
        try:
            found[name] = Recipe.model_validate(tree)
        except ValidationError as error:
            faults += [f"adapters.{name}.{line}" for line in explain(error, Recipe)]
    return found, faults


def _merged(whole: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of one tree with what another one says besides or instead."""
    merged = {key: _copied(value) for key, value in whole.items()}
    for key, value in own.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping) and not _another_kind(before, value):
            merged[key] = _merged(before, value)
        elif value != {}:
            merged[key] = _copied(value)
    return merged


def _another_kind(before: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    return "kind" in own and own["kind"] != before.get("kind")


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _place(tree: dict[str, Any], name: str, own: Mapping[str, Any]) -> None:
    """Give an adapter's run its folder, its name in the trackers, and its repository."""
    training, hub = tree["training"], tree["hub"]
    training["output_dir"] = f"{training.get('output_dir', 'outputs')}/{name}"
    if training.get("run_name") and "run_name" not in own["training"]:
        training["run_name"] = f"{training['run_name']}-{name}"
    if hub.get("repo_id"):
        hub["repo_id"] = f"{hub['repo_id']}-{name}"


def _section_faults(recipe: Recipe) -> Iterator[str]:
    """Faults of the adapters as such: their names, their place, and what they are put on."""
    if recipe.student.lora is None:
        yield (
            "adapters: are adapters on one base, and student.lora isn't given; add student.lora, such as {r: 16, "
            "alpha: 32}"
        )
    lowered = Counter(name.lower() for name in recipe.adapters)
    for name, section in recipe.adapters.items():
        if not _NAME.fullmatch(name) or name in _PREFIX:
            yield (
                f"adapters: got the name {shown(name)}; expected letters, digits, _ and -, beginning with a letter, "
                f"and no part of {_PREFIX!r}"
            )
        if lowered[name.lower()] > 1:
            yield f"adapters: {shown(name)} would share its folder with another one on some systems; choose another"
        if "output_dir" in section.training:
            yield (
                f"adapters.{name}.training.output_dir: is training.output_dir/{name}; leave it out, and set "
                "training.output_dir for all"
            )


def _combined(parts: Mapping[str, Recipe]) -> list[str]:
    """Faults of whole recipes; numbers that YAML reads as texts are converted on the way."""
    told = {name: find_faults(part) for name, part in parts.items()}
    counts = Counter(fault for faults in told.values() for fault in dict.fromkeys(faults))
    lines = [
        fault if counts[fault] == len(parts) > 1 else f"adapters.{name}.{fault}"
        for name, faults in told.items()
        for fault in faults
    ]
    return list(dict.fromkeys(lines))
