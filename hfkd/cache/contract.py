"""What of a data set decides a teacher's word: tokenizer, template, prompt and the texts themselves, as hashes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from hfkd.cache.format import FORMAT_VERSION, json_digest, keys_digest, row_key
from hfkd.data.tokenize import Encoded
from hfkd.data.views import DistillationDataset


def texts_of(dataset: DistillationDataset) -> Iterator[Encoded]:
    """What the teacher reads of each example, in order; demonstrations drawn for the student play no part in it."""
    return (dataset.read_by_teacher(index) for index in range(len(dataset)))


def text_keys(dataset: DistillationDataset) -> list[str]:
    """The key of each example, in order."""
    return [row_key(text["input_ids"], text["labels"]) for text in texts_of(dataset)]


def text_contract(dataset: DistillationDataset, keys: list[str] | None = None) -> dict[str, Any]:
    """The part of a contract that data decide.

    Args:
        dataset: The views.
        keys: From `text_keys`, where they are known already.

    Returns:
        `format_version`, `tokenizer`, `template`, `prompt` and `data`.
    """
    keys = text_keys(dataset) if keys is None else keys
    tokenizer = dataset.builder.tokenizer
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer_digest(tokenizer),
        "template": json_digest(tokenizer.chat_template),
        "prompt": prompt_digest(dataset),
        "data": {"rows": len(keys), "sha256": keys_digest(keys)},
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of which id stands for which token; how texts are cut shows in the texts' own hashes."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json_digest({"tokens": tokenizer.get_vocab(), "special": special})


def prompt_digest(dataset: DistillationDataset) -> str:
    """A hash of how the teacher's prompts are written and which demonstrations they show."""
    style = {
        field.name: getattr(dataset.builder.style, field.name) for field in dataclasses.fields(dataset.builder.style)
    }
    style.pop("stop")  # ends what is generated; no prompt has it
    if style["builder"] is not None:
        style["builder"] = f"{style['builder'].__module__}:{style['builder'].__qualname__}"
    parts = {"style": style, "demonstrations": [dict(row) for row in dataset.demonstrations]}
    return json_digest({**parts, "whole_text": dataset.whole_text})
