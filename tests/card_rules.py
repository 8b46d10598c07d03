"""The hub's rules for the metadata of a model card, as far as they can be checked without the hub.

From its documentation: the page on model cards, the list of licences, and the specification of the metadata
(`modelcard.md`), which says that `model-index`, `datasets` and `license` are verified when a card is pushed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hfkd.card.licences import HUB_LICENCES

RELATIONS = ("adapter", "finetune", "merge", "quantized")
LIBRARIES = ("peft", "transformers")
TYPE = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


def metadata_of(card: str) -> dict[str, Any]:
    """The mapping at the top of a card, read as the hub's own expression finds it."""
    found = REGEX_YAML_BLOCK.search(card)
    assert found is not None, "the card has no metadata"
    read = yaml.safe_load(found.group(2))
    assert isinstance(read, dict), read
    return read


def faults(card: str) -> list[str]:
    """What the hub would refuse or warn of, one line each."""
    data = metadata_of(card)
    found = [f"{key} has no value" for key, one in data.items() if one is None or one == [] or one == ""]
    found += [*_ids(data), *_licence(data), *_words(data), *_index(data)]
    again = ModelCard(card)
    if yaml.safe_load(again.data.to_yaml()) != data:
        found.append("huggingface_hub reads other metadata than it would write")
    return found


def _ids(data: dict[str, Any]) -> Iterator[str]:
    for key in ("base_model", "datasets"):
        given = data.get(key, [])
        for name in given if isinstance(given, list) else [given]:
            try:
                validate_repo_id(name)
            except HFValidationError:
                yield f"{key}: {name!r} is no id"
    relation = data.get("base_model_relation")
    if relation is not None and (relation not in RELATIONS or "base_model" not in data):
        yield f"base_model_relation: {relation!r}"


def _licence(data: dict[str, Any]) -> Iterator[str]:
    given = data.get("license")
    if given is not None and given not in HUB_LICENCES | {"other", "unknown"}:
        yield f"license: {given!r} is none of the hub's"
    if (given == "other") != ("license_name" in data):
        yield "license_name goes with the licence 'other', and with it alone"
    if not re.fullmatch(r"[a-z0-9.+-]+", data.get("license_name", "a")):
        yield f"license_name: {data['license_name']!r}"


def _words(data: dict[str, Any]) -> Iterator[str]:
    for key in ("tags", "metrics"):
        if not all(isinstance(one, str) and one and "\n" not in one for one in data.get(key, [])):
            yield f"{key} holds something else than words"
    if data.get("library_name") not in LIBRARIES:
        yield f"library_name: {data.get('library_name')!r}"
    if data.get("pipeline_tag") != "text-generation":
        yield f"pipeline_tag: {data.get('pipeline_tag')!r}"


def _index(data: dict[str, Any]) -> Iterator[str]:
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not model["name"].strip() or "\n" in model["name"]:
            yield f"model-index: the name is {model.get('name')!r}"
        for result in model["results"]:
            if result["task"].get("type") != "text-generation":
                yield f"model-index: the task is {result['task']}"
            where = result["dataset"]
            if not isinstance(where.get("name"), str) or not TYPE.fullmatch(str(where.get("type"))):
                yield f"model-index: the data set is {where}"
            for metric in result["metrics"]:
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float):
                    yield f"model-index: the metric is {metric}"
