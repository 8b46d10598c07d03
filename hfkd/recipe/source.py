"""From a YAML file and overrides to plain data, and from a fault in them to words.

Knows YAML, dotted keys and how pydantic reports a fault; it doesn't know what any key of a recipe means, except which
sections hold paths of data.
"""

from __future__ import annotations

import difflib
import json
import os
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hfkd.masking import mask, mask_secrets


class RecipeError(ValueError):
    """A recipe that can't be run: one message with a line for each fault."""

    def __init__(self, path: str | Path, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        count = "one fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__("\n  ".join([f"the recipe {path} has {count}:", *self.faults]))


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error and not the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def refuse(self, node: yaml.Node) -> None:
        """Say what a tag such as `!!python/object` asks for; the safe loader only says that it doesn't know it."""
        raise yaml.constructor.ConstructorError(
            None, None, f"the tag {node.tag!r} asks for an object; a recipe holds plain values", node.start_mark
        )


_StrictLoader.add_constructor(None, _StrictLoader.refuse)


def near(name: str, known: Iterable[str]) -> str:
    """`"; did you mean ...?"` with the nearest names, or nothing when none is near."""
    names = [str(option) for option in known]
    found = difflib.get_close_matches(name, names, n=3, cutoff=0.55)
    found += [
        option for option in names if option not in found and len(name) > 3 and (name in option or option in name)
    ]
    return f"; did you mean {' or '.join(found[:3])}?" if found else ""


def shown(value: Any) -> str:
    """A value as it may stand in a message: short, and without secrets."""
    text = repr(mask(value))
    return text if len(text) <= 80 else text[:77] + "..."


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        RecipeError: The file isn't there (near ones are named), can't be parsed, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(str(other) for other in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = near(str(path), beside) or (f"; recipes beside it: {', '.join(beside)}" if beside else "")
        raise RecipeError(path, [f"there is no such file{hint}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(path, [f"it can't be read as text: {error}"]) from None
    form = "JSON" if Path(path).suffix == ".json" else "YAML"
    try:
        # Indented with tabs, JSON is no YAML.
        tree = json.loads(text) if form == "JSON" else yaml.load(text, Loader=_StrictLoader)  # noqa: S506
    except (yaml.YAMLError, ValueError) as error:
        reason = mask_secrets(" ".join(str(error).split()))
        raise RecipeError(path, [f"it is no valid {form}: {reason}"]) from None
    if not isinstance(tree, dict):
        raise RecipeError(path, [f"it holds {shown(tree)}; expected sections such as student:, teacher: and data:"])
    return tree


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Write each `section.key=value` into the tree, in order; sections are created, lists are entered by index.

    Raises:
        RecipeError: No `=`, an empty key, a value that is no YAML, a list entered by a name or past its end, or a key
            below a plain value.
    """
    for override in overrides:
        key, sign, value = override.partition("=")
        parts = key.strip().split(".")
        if not sign or not all(parts):
            raise RecipeError(
                "override", [f"got {shown(override)}; expected section.key=value, such as loss.terms.0.weight=2"]
            )
        try:
            parsed = yaml.load(value, Loader=_StrictLoader)  # noqa: S506 - a subclass of the safe loader
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or "it can't be read"
            raise RecipeError("override", [f"{key}: {shown(value)} is no valid YAML; quote it ({reason})"]) from None
        place: Any = tree
        for depth, part in enumerate(parts[:-1]):
            empty: Any = [] if parts[depth + 1].isdigit() else {}
            place = _enter(place, part, ".".join(parts[: depth + 1]), empty)
        _assign(place, parts[-1], key, parsed)


def _enter(place: Any, part: str, key: str, empty: Any) -> Any:
    """The section below `place`; where there is none it is `empty` from now on."""
    found = place.get(part) if isinstance(place, dict) else _item(place, part, key)
    if found is None:
        found = empty
        _assign(place, part, key, found)
    if not isinstance(found, dict | list):
        raise RecipeError("override", [f"{key} is {shown(found)}, a plain value; nothing below it can be set"])
    return found


def _item(place: list, part: str, key: str) -> Any:
    if not part.isdigit() or int(part) > len(place):
        raise RecipeError(
            "override", [f"{key}: expected an index from 0 to {len(place)} of a list, got {shown(part)}"]
        )
    return place[int(part)] if int(part) < len(place) else None


def _assign(place: Any, part: str, key: str, value: Any) -> None:
    if isinstance(place, dict):
        place[part] = value
        return
    _item(place, part, key)
    if int(part) == len(place):
        place.append(value)
    else:
        place[int(part)] = value


def resolve_paths(tree: dict[str, Any], folders: Sequence[Path]) -> None:
    """Replace each relative data path by where it is first found in `folders`; hub ids and tasks stay as they are."""
    for section in _sources(tree):
        path = section.get("path")
        if not isinstance(path, str) or not path or Path(path).is_absolute() or path.startswith("reasoning_gym:"):
            continue
        found = next((folder / path for folder in folders if (folder / path).exists()), None)
        if found is not None:
            relative = os.path.relpath(found)
            section["path"] = str(found.resolve()) if relative.startswith("..") else Path(relative).as_posix()


def _sources(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    data, evaluation = tree.get("data"), tree.get("evaluation")
    sections = [data.get("train"), data.get("demonstrations")] if isinstance(data, dict) else []
    parts = data.get("transforms") if isinstance(data, dict) else None
    sections += parts if isinstance(parts, list) else []
    if isinstance(evaluation, dict):
        others = evaluation.get("forgetting")
        sections += [evaluation, *(others if isinstance(others, list) else [])]
    yield from (section for section in sections if isinstance(section, dict))
    adapters = tree.get("adapters")
    for own in adapters.values() if isinstance(adapters, dict) else ():
        if isinstance(own, dict):
            yield from _sources(own)


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One line per fault of pydantic: the dotted key, what we got, what was expected, and the nearest valid key."""
    return [_line(fault, root) for fault in error.errors(include_url=False)]


def _line(fault: Any, root: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in fault["loc"]) or "the recipe"
    if fault["type"] == "extra_forbidden":
        known = _keys(_section_at(root, fault["loc"][:-1]))
        return f"{key}: unknown key{near(str(fault['loc'][-1]), known)} (known here: {', '.join(known)})"
    if fault["type"] == "missing":
        return f"{key}: is required and is not given"
    if fault["type"] == "value_error":
        reason = str(fault["ctx"]["error"])
        return (
            f"{key}: {reason}" if isinstance(fault["input"], dict) else f"{key}: got {shown(fault['input'])}; {reason}"
        )
    expected = fault["msg"].removeprefix("Input should be ").removeprefix("a valid dictionary or instance of ")
    hint = (
        near(str(fault["input"]), fault["ctx"]["expected"].split("'")[1::2])
        if fault["type"] == "literal_error"
        else ""
    )
    if fault["type"] == "model_type":
        expected = "a section with keys: " + ", ".join(_keys(_section_at(root, fault["loc"])))
    return f"{key}: got {shown(fault['input'])} ({type(fault['input']).__name__}); expected {expected}{hint}"


def _keys(section: type[BaseModel]) -> list[str]:
    """The keys as they are written in a file: `from` can be no name in Python."""
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_at(root: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel]:
    """The section class that a location of a fault points to."""
    section = root
    for part in location:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        section = next(_sections_of(field.annotation), section) if field is not None else section
    return section


def _sections_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _sections_of(part)
