"""Reads a cache: checks its shards against the manifest, unpacks them once into a memory-mapped file, and makes rows
of any texts.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file

from hfkd.cache.code import Reading
from hfkd.cache.codecs import make_codec
from hfkd.cache.format import HEAD_NAME, CacheError, Manifest
from hfkd.files import file_digest
from hfkd.rows import DenseRows, Head, TopKRows
from hfkd.teacher_rows import SampledRows

_NAMED = 3  # texts or files that a message names
_ANEW = "build the cache anew with --overwrite"


def find_faults(folder: Path, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Hold the files of a share against the manifest.

    Args:
        folder: The cache.
        manifest: Its own.
        share: Number of this process, and how many there are.

    Returns:
        What is wrong, a text for each file.
    """
    faults = []
    for name, digest, size in _files(manifest)[share[0] :: share[1]]:
        path = Path(folder) / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif size is not None and path.stat().st_size != size:
            faults.append(f"{name} has {path.stat().st_size} bytes, the manifest says {size}: it was cut or changed")
        elif file_digest(path) != digest:
            faults.append(f"{name} has other bytes than the manifest says (sha256)")
    return faults


def _files(manifest: Manifest) -> list[tuple[str, str, int | None]]:
    """Name, SHA-256 and size, where it is known, of each file of a cache besides its manifest."""
    files = [(shard["name"], shard["sha256"], shard["bytes"]) for shard in manifest.shards]
    if "head" in manifest.facts:
        files.append((HEAD_NAME, manifest.facts["head"]["sha256"], None))
    return files


class CacheReader:
    """A cache that was found to be whole.

    Args:
        folder: The cache.
        manifest: Its own.
        device: Where the head of `hidden` shall be.
        verify: Whether to hash what is unpacked, and what was unpacked before.

    Raises:
        CacheError: The build was interrupted, or the shards aren't what the manifest says.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, device: torch.device | str = "cpu", verify: bool = True
    ) -> None:
        if manifest.status != "complete":
            raise CacheError(
                f"The cache in {folder} isn't finished: its build was interrupted. Run the same `hfkd cache` command "
                "again, it goes on where it stopped."
            )
        self.folder, self.manifest, self.verify = Path(folder), manifest, verify
        if absent := [name for name, *_ in _files(manifest) if not (self.folder / name).is_file()]:
            raise CacheError(f"The cache in {folder} lacks {', '.join(absent[:_NAMED])}; copy it anew, or {_ANEW}.")
        self.codec = make_codec(**manifest.contract["codec"])
        head, dtype = None, None
        if "head" in manifest.facts:
            head, dtype = self._head(torch.device(device)), manifest.facts["head"]["states"]
        temperature = manifest.contract.get("temperature") or 1.0
        self.reading = Reading(manifest.contract["vocab_size"], float(temperature), head, dtype)
        self._table = self._open()
        if absent := {"row_hash", "tokens", *self.codec.columns()} - set(self._table.column_names):
            raise CacheError(f"The shards in {folder} have no columns {sorted(absent)}; {_ANEW}.")
        names = np.asarray(self._table.column("row_hash").to_pylist(), dtype="S32")
        self._order = np.argsort(names, kind="stable")
        self._names = names[self._order]
        self._tokens = self._table.column("tokens").to_numpy()
        self._columns = {name: _Column(self._table.column(name)) for name in self.codec.columns()}
        found, told = ((len(names), int(self._tokens.sum())), (manifest.build["rows"], manifest.build["tokens"]))
        if found != told:
            raise CacheError(
                f"The shards in {folder} hold {found[0]} rows with {found[1]} tokens, the manifest says {told[0]} "
                f"with {told[1]}; {_ANEW}."
            )

    def __len__(self) -> int:
        return len(self._names)

    def missing(self, keys: Sequence[str]) -> list[int]:
        """The places of the keys that the cache doesn't hold."""
        return np.flatnonzero(self._find(keys) < 0).tolist()

    def rows(
        self, keys: Sequence[str], tokens: Sequence[int], device: torch.device
    ) -> TopKRows | SampledRows | DenseRows:
        """The teacher's rows of several texts, one behind the other.

        Args:
            keys: Of the texts.
            tokens: How many supervised tokens each has.
            device: Where the rows shall be.

        Raises:
            CacheError: A text isn't there.
        """
        places = self._find(keys) if keys else np.empty(0, dtype=np.int64)
        if (absent := np.flatnonzero(places < 0)).size:
            named = [keys[place] for place in absent[:_NAMED]]
            raise CacheError(
                f"{absent.size} of {len(keys)} texts of the batch aren't in the cache {self.folder}, among them "
                f"{named}. Build it from the same data, tokenizer and prompt."
            )
        if (stored := self._tokens[places]).tolist() != list(tokens):
            raise CacheError(
                f"The cache {self.folder} has {stored.tolist()} supervised tokens for texts that have {list(tokens)}."
            )
        columns = {
            name: [column[place] for place in places] or [column[0][:0]] for name, column in self._columns.items()
        }
        return self.codec.read(columns, tokens, self.reading, device)

    def _find(self, keys: Sequence[str]) -> np.ndarray:
        """[n] the row of each key, -1 where there is none."""
        wanted = np.asarray(keys, dtype="S32")
        if not len(self._names):
            return np.full(len(wanted), -1)
        places = np.searchsorted(self._names, wanted).clip(max=len(self._names) - 1)
        return np.where(self._names[places] == wanted, self._order[places], -1)

    def _open(self) -> pa.Table:
        """All shards as one table on disk: an uncompressed copy beside what `datasets` keeps, under the manifest's
        hash, so that another cache in the same place can't be taken for this one.
        """
        import datasets

        place = Path(datasets.config.HF_DATASETS_CACHE) / "hfkd_cache" / f"{self.manifest.digest[:32]}.arrow"
        note = place.with_suffix(".sha256")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(place.with_suffix(".lock")):
                if not self._is_whole(place, note):
                    self._unpack(place, note)
            with pa.memory_map(str(place)) as file:
                return pa.ipc.open_file(file).read_all()
        except (pa.ArrowInvalid, OSError) as problem:
            raise CacheError(
                f"The shards in {self.folder} can't be opened by way of their uncompressed copy {place}: {problem}. "
                "HF_DATASETS_CACHE says where such copies lie."
            ) from problem

    def _is_whole(self, place: Path, note: Path) -> bool:
        """Whether the copy lies there, with the bytes that were written."""
        if not (place.is_file() and note.is_file()):
            return False
        return not self.verify or file_digest(place) == note.read_text()

    def _unpack(self, place: Path, note: Path) -> None:
        """Write all shards uncompressed, one behind the other; a copy that wasn't checked serves only who asks for no
        hashes.
        """
        draft = place.with_name(f"{place.name}.draft")
        tables = map(self._table_of, self.manifest.shards)
        first = next(tables)
        try:
            with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
                for table in itertools.chain([first], tables):
                    writer.write_table(table.combine_chunks())
            note.write_text(file_digest(draft) if self.verify else "unchecked")
            os.replace(draft, place)
        finally:
            draft.unlink(missing_ok=True)

    def _table_of(self, shard: dict[str, Any]) -> pa.Table:
        """The rows of a shard, of the very bytes that were hashed."""
        content = (self.folder / shard["name"]).read_bytes()
        if self.verify and hashlib.sha256(content).hexdigest() != shard["sha256"]:
            raise CacheError(f"{shard['name']} in {self.folder} has other bytes than the manifest says; {_ANEW}.")
        return pq.read_table(pa.BufferReader(content))

    def _head(self, device: torch.device) -> Head:
        facts = self.manifest.facts["head"]
        try:
            tensors = {name: tensor.to(device) for name, tensor in load_file(self.folder / HEAD_NAME).items()}
        except SafetensorError as problem:
            raise CacheError(f"{HEAD_NAME} in {self.folder} is damaged ({problem}); {_ANEW}.") from None
        return Head(tensors["weight"], tensors.get("bias"), facts["scale"], facts["soft_cap"])


class _Column:
    """A column as arrays that are views on the file, one for each row."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = [_pieces(chunk) for chunk in column.chunks]
        self._ends = np.cumsum([len(offsets) - 1 for offsets, _ in self._chunks])

    def __getitem__(self, row: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._ends, row, side="right"))
        offsets, values = self._chunks[chunk]
        place = row - (int(self._ends[chunk - 1]) if chunk else 0)
        return values[offsets[place] : offsets[place + 1]]


def _pieces(chunk: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Where each row of a chunk begins, and all its values."""
    if pa.types.is_binary(chunk.type) or pa.types.is_large_binary(chunk.type):
        kind = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
        _, offsets, values = chunk.buffers()
        found = np.frombuffer(offsets, dtype=kind)[chunk.offset : chunk.offset + len(chunk) + 1]
        return found, np.frombuffer(values, dtype=np.uint8) if values is not None else np.empty(0, np.uint8)
    return chunk.offsets.to_numpy(), chunk.values.to_numpy(zero_copy_only=False)
