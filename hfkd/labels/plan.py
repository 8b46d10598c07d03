"""The file of `hfkd label`: every key with its type, its limits and its default, and which keys go together.

Nothing is asked and no row is read here. Keys of a template or a filter are arguments of its class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from hfkd.recipe.fields import Number, Options, Positive, Text
from hfkd.recipe.schema import PartSection, Section, SourceSection
from hfkd.recipe.source import RecipeError, apply_overrides, explain, read_yaml, resolve_paths

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


def _url(value: Any) -> Any:
    """An address without a secret in it.

    Raises:
        ValueError: It is none, or has a name, a password or a query.
    """
    parts = urlsplit(value) if isinstance(value, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected an address such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError("expected an address without a name, a password or a query; keys come from api_key_env")
    return value


class PriceSection(Section):
    """What a million tokens cost, in any currency."""

    prompt: Annotated[Number, Field(ge=0)]
    completion: Annotated[Number, Field(ge=0)]


class EndpointSection(Section):
    """Where the teacher is, and how it is treated. Times are in seconds.

    `api_key_env` names the environment variable that holds the key. `attempts` counts the first one. `give_up_after`
    questions in a row without an answer end the run; one that was refused or written badly in an earlier run, and is
    again, doesn't count. `longest_wait` is the longest Retry-After that is waited for.
    """

    url: Annotated[Text, BeforeValidator(_url)]
    model: Text
    api_key_env: str | None = "OPENAI_API_KEY"
    timeout: Annotated[Number, Field(gt=0)] = 60.0
    attempts: Positive = 5
    backoff: Annotated[Number, Field(ge=0)] = 1.0
    longest_wait: Annotated[Number, Field(ge=0)] = 300.0
    give_up_after: Positive = 20
    parallel: Annotated[Positive, Field(le=256)] = 4
    requests_per_minute: Annotated[Number, Field(gt=0)] | None = None
    tokens_per_minute: Positive | None = None
    price: PriceSection | None = None
    budget: Annotated[Number, Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_key(cls, values: Any) -> Any:
        """A key that was put where its name belongs must not be shown: so not as a fault of the field."""
        name = values.get("api_key_env") if isinstance(values, dict) else None
        if name is not None and not (isinstance(name, str) and len(name) <= 64 and _VARIABLE.fullmatch(name)):
            raise ValueError(
                "api_key_env: expected the name of an environment variable, in capitals, such as OPENAI_API_KEY, "
                "never the key itself"
            )
        return values

    @model_validator(mode="after")
    def _budget_has_a_price(self) -> EndpointSection:
        if self.budget is not None and self.price is None:
            raise ValueError("budget needs price: {prompt: ..., completion: ...}, what a million tokens cost")
        return self


class GenerationSection(Section):
    """How the teacher writes. `temperature_again` is used, if it is the higher one, after a text that was bad.

    `extra` goes into the body of each request as it is, for what an endpoint has of its own.
    """

    max_tokens: Positive = 256
    temperature: Annotated[Number, Field(ge=0)] = 0.0
    temperature_again: Annotated[Number, Field(ge=0)] = 0.7
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    stop: list[Text] = []
    seed: int | None = None
    extra: Options = {}

    @model_validator(mode="after")
    def _extra_is_extra(self) -> GenerationSection:
        ours = {"model", "messages", "temperature", "top_p", "stop", "seed", "n", "stream", "max_tokens"}
        if taken := sorted(ours & set(self.extra)):
            raise ValueError(f"extra holds {taken[0]}, which has its own place or isn't supported")
        return self


class LabelPlan(Section):
    """What is asked, of whom, about which rows, and what of the answers is kept.

    Of `samples` texts for each row the first one that passes all filters is kept, or all different ones (`keep: all`).
    """

    endpoint: EndpointSection
    data: SourceSection
    template: PartSection
    generation: GenerationSection = GenerationSection()
    samples: Positive = 1
    filters: list[PartSection] = []
    keep: Literal["first", "all"] = "first"
    output_dir: Text = "outputs/labels"

    def resolved(self) -> dict[str, Any]:
        """Plain data with all defaults."""
        return self.model_dump(mode="json")


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> LabelPlan:
    """Read a plan and refuse it, with every fault in one message, before anything is asked.

    Args:
        path: A YAML file; a relative path of data is looked for beside it first.
        overrides: `section.key=value`, as for a recipe.

    Returns:
        With its defaults; `output_dir` is `outputs/<name of the file>` when not given. Classes of the user's own
        aren't imported yet.

    Raises:
        RecipeError: The file is missing or no YAML, a key is unknown, a value is wrong, or keys don't go together.
    """
    path = Path(path)
    tree = read_yaml(path)
    _resolve(tree, [path.parent, Path.cwd()])
    apply_overrides(tree, overrides)
    _resolve(tree, [Path.cwd(), path.parent])
    tree.setdefault("output_dir", f"outputs/{path.stem}")
    try:
        plan = LabelPlan.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(path, explain(error, LabelPlan)) from None
    if faults := list(_faults(plan)):
        raise RecipeError(path, faults)
    return plan


def own_code(plan: LabelPlan) -> dict[str, str]:
    """Every `package.module:Name` of the user's own that a run would import, by its key."""
    places = {"template.kind": plan.template.kind, "data.format": plan.data.format}
    for number, section in enumerate(plan.filters):
        places[f"filters.{number}.kind"] = section.kind
        places[f"filters.{number}.verifier"] = (section.model_extra or {}).get("verifier")
    named = {key: name for key, name in places.items() if isinstance(name, str) and ":" in name}
    return {key: name for key, name in named.items() if not name.startswith("hfkd.")}


def _resolve(tree: dict[str, Any], folders: Sequence[Path]) -> None:
    """As for the training rows of a recipe."""
    if isinstance(tree.get("data"), dict):
        resolve_paths({"data": {"train": tree["data"]}}, folders)


def _faults(plan: LabelPlan) -> list[str]:
    found = []
    if plan.samples > 1 and plan.generation.temperature == 0:
        found.append(
            f"samples: got {plan.samples} with generation.temperature 0; all would be the same text. Raise the "
            "temperature, or ask once"
        )
    kinds = [section.kind for section in plan.filters]
    if "agreement" in kinds and plan.samples < 2:
        found.append("filters: agreement compares several samples, and samples is 1; ask for more")
    return found
