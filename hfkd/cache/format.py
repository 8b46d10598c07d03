"""The form of a cache: what its files are called, how a row is named, what the manifest says and when it is refused.

The manifest is a contract: the cache was made by this teacher, with this tokenizer, template, prompt and data, at this
temperature, in this code. No date and no path of a machine is in it, so that two builds of the same thing are the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hfkd.batch import IGNORE, View
from hfkd.files import write_whole

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
HEAD_NAME = "head.safetensors"
_KEY_BYTES = 16


class CacheError(ValueError):
    """A cache can't be written, is damaged, or isn't the one that a run expects."""


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"part-{number:05d}.parquet"


def row_key(ids: Sequence[int] | np.ndarray, labels: Sequence[int] | np.ndarray) -> str:
    """Name a text by its tokens and by which of them are learned, so that order, batch and padding don't matter.

    Args:
        ids: [T] token ids of the teacher's view, without padding.
        labels: [T] its labels, -100 where nothing is learned.

    Returns:
        32 hexadecimal digits.
    """
    tokens = np.ascontiguousarray(ids, dtype="<i4")
    learned = np.flatnonzero(np.asarray(labels)[1:] != IGNORE).astype("<i4")
    digest = hashlib.blake2b(np.int32(len(tokens)).astype("<i4").tobytes(), digest_size=_KEY_BYTES)
    digest.update(tokens.tobytes())
    digest.update(learned.tobytes())
    return digest.hexdigest()


def view_keys(view: View) -> tuple[list[str], list[int]]:
    """The key of each row of a padded view, and how many of its tokens are learned."""
    ids, labels = view.input_ids.cpu().numpy(), view.labels.cpu().numpy()
    real = view.attention_mask.cpu().numpy().astype(bool)
    keys, counts = [], []
    for tokens, marks, here in zip(ids, labels, real, strict=True):
        own = marks[here]
        keys.append(row_key(tokens[here], own))
        counts.append(int((own[1:] != IGNORE).sum()))
    return keys, counts


def keys_digest(keys: Sequence[str]) -> str:
    """The hash of a data set: its keys in their order."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(bytes.fromhex(key))
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


@dataclass
class Manifest:
    """What `manifest.json` says.

    Args:
        contract: Nested plain data: `format_version`, `teacher`, `tokenizer`, `template`, `prompt`, `data`,
            `temperature`, `codec`, `vocab_size`.
        build: How the shards were cut: `batch_size`, `rows`, `tokens`, `shards`. A build goes on only with the same.
        status: `building` or `complete`.
        shards: Name, rows, tokens, bytes and SHA-256 of each shard; empty until the cache is complete.
        facts: What follows from the build: bytes per token, the error of the code, the head of `hidden`.
    """

    contract: dict[str, Any]
    build: dict[str, Any]
    status: str = "building"
    shards: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The hash of all that it says."""
        return json_digest(self._content())

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, whole or not at all."""
        text = json.dumps({**self._content(), "sha256": self.digest}, indent=2, ensure_ascii=False)
        write_whole(folder / MANIFEST_NAME, (text + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check `manifest.json`.

        Raises:
            CacheError: There is none, it is no manifest, it is of another format, or it was edited.
        """
        path = Path(folder) / MANIFEST_NAME
        if Path(folder).is_file():
            raise CacheError(f"{folder} is a file; a cache is a folder that holds a {MANIFEST_NAME}.")
        if not path.is_file():
            raise CacheError(
                f"{folder} holds no cache: there is no {MANIFEST_NAME}. Make one with "
                f"`hfkd cache RECIPE --out {folder}`."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            stored = content.pop("sha256")
            found = cls(**content)
            version = found.contract["format_version"]
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            raise CacheError(
                f"{path} is damaged ({type(problem).__name__}: {problem}); build the cache anew with --overwrite."
            ) from None
        if found.digest != stored:
            raise CacheError(
                f"{path} was edited after it was written: its sha256 is {found.digest[:12]}, it says "
                f"{str(stored)[:12]}. Bring it back, or build the cache anew with --overwrite."
            )
        if version != FORMAT_VERSION:
            raise CacheError(
                f"format_version: the cache in {folder} has {version}, this version of hfkd reads {FORMAT_VERSION}; "
                "build it anew."
            )
        return found

    def _content(self) -> dict[str, Any]:
        content = {"status": self.status, "contract": self.contract, "build": self.build}
        return json.loads(json.dumps({**content, "shards": self.shards, "facts": self.facts}))  # as it reads back


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], whole: bool = False) -> list[str]:
    """Where two contracts differ, one text for each field, under its dotted name.

    Args:
        stored: The contract of the cache.
        wanted: What a run says; by default fields that it doesn't mention are not compared.
        whole: Compare all fields of both.
    """
    theirs, ours = _flat(stored), _flat(wanted)
    names = list(dict.fromkeys([*theirs, *ours])) if whole else list(ours)
    return [
        f"{name}: the cache has {_short(theirs.get(name))}, this run has {_short(ours.get(name))}"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]


def compare(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path | str, remedy: str, whole: bool = False
) -> None:
    """Refuse a cache whose contract differs.

    Args:
        stored: The contract of the cache.
        wanted: What a run says.
        folder: Where the cache is, for the message.
        remedy: What to do about it.
        whole: As in `differences`.

    Raises:
        CacheError: Names every field that differs, with both values.
    """
    if found := differences(stored, wanted, whole):
        raise CacheError(f"The cache in {folder} is another one. {'; '.join(found)}. {remedy}")


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in json.loads(json.dumps(value, default=str)).items():
        if isinstance(item, dict) and item and not prefix:
            flat |= _flat(item, f"{name}.")
        else:
            flat[f"{prefix}{name}"] = item
    return flat


def _short(value: Any) -> str:
    text = repr(value)
    is_hash = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return value[:12] if is_hash else text if len(text) <= 120 else text[:117] + "..."
