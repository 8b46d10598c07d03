"""Builds a cache: texts ordered by length, cut into batches and shards, each shard written whole or not at all.

The plan is a function of the texts and the batch size alone, so whatever was killed and however many processes share
the work, the finished folder holds the same bytes. Knows no teacher; it is handed a function that makes rows of a
view.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save
from torch import Tensor

from hfkd.batch import IGNORE, View
from hfkd.cache.code import Arrays, Codec
from hfkd.cache.folder import is_full, own_files, remove_drafts, remove_notes, size_in_words
from hfkd.cache.format import (
    HEAD_NAME,
    MANIFEST_NAME,
    CacheError,
    Manifest,
    compare,
    differences,
    json_digest,
    row_key,
    shard_name,
)
from hfkd.data.tokenize import Encoded
from hfkd.files import file_digest, write_whole
from hfkd.rows import DenseRows, Head

SHARD_BYTES = 64 * 2**20
"""A shard holds about so much at most."""

SHARDS_AT_LEAST = 8
"""A cache has at least so many shards, if it has as many batches: a kill costs an eighth, and eight processes have
work."""

_PROJECTED = 2**25
"""Log-probabilities that are held at once."""

_ROW_BYTES, _SHARD_OVERHEAD = 64, 8192  # keys and lengths of a text; what Parquet says of a shard


@dataclass(frozen=True)
class Plan:
    """Which texts go where.

    Attributes:
        order: Each different text once, by its number in the data: the longest first, ties by key.
        keys: Of the texts in this order.
        tokens: Supervised tokens of each, in this order.
        batch_size: Texts that are run together.
        shards: Where each shard begins and ends in `order`.
    """

    order: tuple[int, ...]
    keys: tuple[str, ...]
    tokens: tuple[int, ...]
    batch_size: int
    shards: tuple[range, ...]

    def describe(self) -> dict[str, Any]:
        """What a build must share with the one that it continues."""
        texts = json_digest([self.keys, [shard.stop for shard in self.shards]])
        counts = {"rows": len(self.order), "tokens": sum(self.tokens), "shards": len(self.shards)}
        return {"batch_size": self.batch_size, **counts, "plan": texts}


def make_plan(texts: Sequence[Encoded], batch_size: int, bytes_per_token: int, shard_bytes: int = SHARD_BYTES) -> Plan:
    """Order texts by length, so that batches need little padding, and cut them into shards.

    Args:
        texts: What the teacher reads.
        batch_size: Texts that are run together.
        bytes_per_token: At most.
        shard_bytes: About the size of a shard.
    """
    found: dict[str, tuple[int, int, int]] = {}
    for number, text in enumerate(texts):
        labels = text["labels"]
        learned = sum(label != IGNORE for label in labels[1:])
        found.setdefault(row_key(text["input_ids"], labels), (len(labels), number, learned))
    keys = sorted(found, key=lambda key: (-found[key][0], key))
    tokens = [found[key][2] for key in keys]
    batches = [range(start, min(start + batch_size, len(keys))) for start in range(0, len(keys), batch_size)]
    limit = min(shard_bytes, -(-sum(tokens) * bytes_per_token // SHARDS_AT_LEAST))
    shards, start, size = [], 0, 0
    for batch in batches:
        size += sum(tokens[batch.start : batch.stop]) * bytes_per_token
        if size >= limit or batch.stop == len(keys):
            shards.append(range(start, batch.stop))
            start, size = batch.stop, 0
    return Plan(tuple(found[key][1] for key in keys), tuple(keys), tuple(tokens), batch_size, tuple(shards))


class CacheWriter:
    """One build, or the rest of one that was interrupted.

    Args:
        folder: Where the cache is to be.
        texts: What the teacher reads, by number.
        codec: How its word is kept.
        contract: What the cache was made of; `codec` and `vocab_size` are added here.
        head: The teacher's, cut to the ids that count.
        pad_token_id: Fills up batches.
        batch_size: Texts that are run together.
        device: Where views are put.
        hidden_dtype: Of the teacher's hidden states.
        shard_bytes: About the size of a shard.
    """

    def __init__(
        self,
        folder: Path,
        texts: Sequence[Encoded],
        codec: Codec,
        contract: dict[str, Any],
        head: Head,
        *,
        pad_token_id: int,
        batch_size: int = 16,
        device: torch.device | str = "cpu",
        hidden_dtype: torch.dtype = torch.float32,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder, self.texts, self.codec, self.head = Path(folder), texts, codec, head
        self.pad_token_id, self.device = pad_token_id, torch.device(device)
        self.token_bytes = codec.bytes_per_token(head.vocab_size, head.weight.shape[1], hidden_dtype.itemsize)
        self.plan = make_plan(texts, batch_size, self.token_bytes, shard_bytes)
        whole = {**contract, "codec": codec.describe(), "vocab_size": head.vocab_size}
        self.manifest = Manifest(whole, self.plan.describe())
        self.temperature = float(contract.get("temperature") or 1.0)
        self.hidden_dtype = str(hidden_dtype).removeprefix("torch.")
        self.missing: list[int] = []

    def open(self) -> bool:
        """Look at the folder and find what is missing; writes nothing.

        Returns:
            Whether the cache is complete already.

        Raises:
            CacheError: The folder holds another cache, the disk hasn't the space, or teacher and codec can't be kept.
        """
        self.codec.check(self.head.vocab_size)
        self._check_head()
        if (self.folder / MANIFEST_NAME).exists():
            before = Manifest.read(self.folder)
            theirs, ours = ({**one.contract, "build": one.build} for one in (before, self.manifest))
            compare(theirs, ours, self.folder, self._remedy(before), whole=True)
            if before.status == "complete":
                return True
        elif any(not path.name.startswith(".") for path in own_files(self.folder)):
            raise CacheError(
                f"{self.folder} has a cache's files but no {MANIFEST_NAME}, so it can't be known what they are; "
                "choose another folder, or delete them with --overwrite."
            )
        self.missing = [number for number in range(len(self.plan.shards)) if not self._is_written(number)]
        self._check_space()
        return False

    def begin(self) -> None:
        """Make the folder, its manifest and the head; for the first process alone, after all have called `open`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_drafts(self.folder)
            self.manifest.write(self.folder)
            if not self.codec.reads_logits:
                write_whole(self.folder / HEAD_NAME, self._head_bytes())
        except OSError as problem:
            raise self._full(problem) from problem

    def write(
        self,
        speak: Callable[[View], DenseRows],
        share: tuple[int, int] = (0, 1),
        report: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """Write the missing shards of a share.

        Args:
            speak: Says something of the supervised tokens of a view.
            share: Number of this process, and how many there are.
            report: Called with the supervised tokens of each batch.

        Raises:
            CacheError: The disk is full, or what the teacher says is no number. Nothing half-written stays.
        """
        for number in self.missing[share[0] :: share[1]]:
            table = self._table(self.plan.shards[number], speak, report)
            sink = pa.BufferOutputStream()
            pq.write_table(
                table, sink, compression="zstd", use_dictionary=False, write_statistics=False, store_schema=True
            )
            try:
                write_whole(self.folder / shard_name(number), sink.getvalue().to_pybytes())
                write_whole(self._note(number), json.dumps(self._facts_of(number)).encode())
            except OSError as problem:
                raise self._full(problem) from problem

    def finish(self) -> Manifest:
        """Close the build: hashes into the manifest, notes removed; for the first process, once all have written."""
        shards = [json.loads(self._note(number).read_text()) for number in range(len(self.plan.shards))]
        size = sum(shard["bytes"] for shard in shards)
        facts: dict[str, Any] = {
            "bytes_per_token": round(size / max(1, sum(self.plan.tokens)), 2),
            "error": self.codec.error,
        }
        if not self.codec.reads_logits:
            named = self.codec.describe()["dtype"]
            facts["head"] = {
                "sha256": file_digest(self.folder / HEAD_NAME),
                "scale": self.head.scale,
                "soft_cap": self.head.soft_cap,
                "states": self.hidden_dtype if named == "model" else named,
            }
        self.manifest.status, self.manifest.shards, self.manifest.facts = "complete", shards, facts
        try:
            self.manifest.write(self.folder)
        except OSError as problem:
            raise self._full(problem) from problem
        remove_notes(self.folder)
        return self.manifest

    def _table(self, shard: range, speak: Callable[[View], DenseRows], report: Callable[[int], None]) -> pa.Table:
        """All columns of a shard."""
        packed: list[Arrays] = []
        for start in range(shard.start, shard.stop, self.plan.batch_size):
            places = range(start, min(start + self.plan.batch_size, shard.stop))
            packed += self._encode(places, speak)
            report(sum(self.plan.tokens[place] for place in places))
        columns = {
            "row_hash": pa.array([self.plan.keys[place] for place in shard], pa.string()),
            "tokens": pa.array([self.plan.tokens[place] for place in shard], pa.int32()),
        }
        for name, kind in self.codec.columns().items():
            columns[name] = _column([one[name] for one in packed], kind)
        return pa.table(columns)

    def _encode(self, places: range, speak: Callable[[View], DenseRows]) -> Iterator[Arrays]:
        """What the codec keeps of each text of a batch."""
        counts = [self.plan.tokens[place] for place in places]
        view = pad_view([self.texts[self.plan.order[place]] for place in places], self.pad_token_id, self.device)
        with torch.no_grad():
            rows = speak(view)
            if len(rows) != sum(counts):
                raise CacheError(f"The teacher gave {len(rows)} rows for {sum(counts)} supervised tokens.")
            if not bool(torch.isfinite(rows.hidden).all()):
                keys = [self.plan.keys[place] for place in places]
                raise CacheError(f"The teacher's hidden states of the texts {keys} aren't finite numbers.")
            drawn = [self.codec.draws(self.plan.keys[place], self.plan.tokens[place]) for place in places]
            draws = None if drawn[0] is None else torch.from_numpy(np.concatenate(drawn)).to(rows.hidden.device)
            told = self._tell(rows.first(self.head.vocab_size).detached(), draws)
        ends = np.cumsum(counts)
        for start, end in zip(ends - counts, ends, strict=True):
            one = {name: values[start:end] for name, values in told.items()}
            yield self.codec.pack(one, self.head.vocab_size)

    def _tell(self, rows: DenseRows, draws: Tensor | None) -> Arrays:
        if not self.codec.reads_logits:
            return self.codec.tell(rows.hidden, None)
        parts, size = [], max(1, _PROJECTED // rows.vocab_size)
        for start in range(0, max(1, len(rows)), size):
            some = slice(start, min(start + size, len(rows)))
            buffer = torch.empty(some.stop - start, rows.vocab_size, dtype=torch.float32, device=rows.hidden.device)
            logits = rows.logits(some, buffer).float()
            log_probs = torch.log_softmax(logits if self.temperature == 1.0 else logits / self.temperature, dim=-1)
            if not bool(torch.isfinite(log_probs.amax(dim=-1)).all()):
                raise CacheError("The teacher's logits of some tokens aren't finite numbers; nothing of them is kept.")
            parts.append(self.codec.tell(log_probs, None if draws is None else draws[some]))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _remedy(self, before: Manifest) -> str:
        """What to do about another cache; a build that was begun in other batches can go on in those."""
        other = "Choose another folder, or delete this cache with --overwrite."
        size = before.build.get("batch_size")
        others = differences(before.contract, self.manifest.contract, whole=True)
        if before.status == "complete" or size == self.plan.batch_size or others:
            return other
        return f"This build was begun with --batch-size {size} and goes on with it alone. {other}"

    def _check_head(self) -> None:
        """Refuse a head that would be kept and makes no distribution; a bias of -inf rules an id out."""
        if self.codec.reads_logits:
            return
        bias = torch.zeros(1) if self.head.bias is None else self.head.bias
        if not bool(torch.isfinite(self.head.weight).all()) or not bool((bias < float("inf")).all()):
            raise CacheError("The teacher's output head has numbers that aren't finite; nothing of it is kept.")

    def _is_written(self, number: int) -> bool:
        """Whether a shard lies there whole, which its note and its own bytes say."""
        try:
            note = json.loads(self._note(number).read_text())
            return note == self._facts_of(number)
        except (OSError, ValueError):
            return False

    def _facts_of(self, number: int) -> dict[str, Any]:
        path, shard = self.folder / shard_name(number), self.plan.shards[number]
        tokens = sum(self.plan.tokens[shard.start : shard.stop])
        counts = {"name": path.name, "rows": len(shard), "tokens": tokens}
        return {**counts, "bytes": path.stat().st_size, "sha256": file_digest(path)}

    def _note(self, number: int) -> Path:
        return (self.folder / shard_name(number)).with_suffix(".json")

    def _head_bytes(self) -> bytes:
        tensors = {"weight": self.head.weight, "bias": self.head.bias}
        return save({name: one.detach().cpu().contiguous() for name, one in tensors.items() if one is not None})

    def _needed(self) -> int:
        """Bytes that are still to be written, at most."""
        shards = [self.plan.shards[number] for number in self.missing]
        tokens = sum(sum(self.plan.tokens[shard.start : shard.stop]) for shard in shards)
        head = 0 if self.codec.reads_logits else self.head.weight.numel() * self.head.weight.element_size()
        return tokens * self.token_bytes + sum(map(len, shards)) * _ROW_BYTES + len(shards) * _SHARD_OVERHEAD + head

    def _check_space(self) -> None:
        here = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(here).free
        if free < self._needed():
            raise CacheError(
                f"The cache needs up to {size_in_words(self._needed())} in {self.folder} ({len(self.missing)} shards "
                f"are missing), and {size_in_words(free)} are free there. Give --out another disk, or a smaller code: "
                "--compact, a smaller --k."
            )

    def _full(self, problem: OSError) -> BaseException:
        """What to say of a write that failed."""
        if not is_full(problem):
            return problem
        self.missing = [number for number in self.missing if not self._is_written(number)]
        lacking = (
            f"up to {size_in_words(self._needed())} are needed for the {len(self.missing)} shards that are missing"
            if self.missing
            else f"all shards are written, and {MANIFEST_NAME}, which closes the build, couldn't be"
        )
        return CacheError(
            f"The disk of {self.folder} is full: {lacking}. What is written is whole; make room and run the same "
            "command again, it goes on from there."
        )


def pad_view(texts: Sequence[Encoded], pad_token_id: int, device: torch.device) -> View:
    """Texts as one view, padded on the right."""
    width = max(len(text["input_ids"]) for text in texts)

    def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)

    ids = [text["input_ids"] for text in texts]
    mask = padded([[1] * len(row) for row in ids], 0)
    return View(padded(ids, pad_token_id), mask, padded([text["labels"] for text in texts], IGNORE))


def _column(pieces: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    """One column out of an array for each text."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pa.array([piece.tobytes() for piece in pieces], kind)
    offsets = np.cumsum([0, *map(len, pieces)]).astype(np.int32)
    values = pa.array(np.concatenate(pieces), kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), values)
