"""Which supervised rows are projected together, and which terms read what of them.

Terms that read each row alone share their chunks; a term that compares rows is given its groups whole. It doesn't know
what the terms measure, nor how a chunk is worked through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from hfkd.rows import RowLayout
from hfkd.terms import Term

CHUNK_BYTES = {"cpu": 2**28}
"""The most that the two logit buffers of a chunk take together when the number of rows is left to us, by device."""

CHUNK_BYTES_ELSEWHERE = 2**30
"""The same for devices that aren't named: few large products are what is fast there."""

SHARE_OF_FREE_MEMORY = 8
"""The buffers never take more than one part in so many of what is free; a loss may need some more of the same size."""

Rows = Tensor | slice
"""Rows of a chunk within all rows: a slice, or indices where rows were put into groups."""


@dataclass(frozen=True)
class Reader:
    """Terms that read a chunk together.

    Args:
        members: The terms, by number.
        blocks: The extents that they read, one after the other; None stands for blocks of any size.
        numbers: The group number of each block.
        auxiliary: Whether their gradient stays out of the student's output head.
    """

    members: list[int]
    blocks: list[slice] | None = None
    numbers: list[int] | None = None
    auxiliary: bool = False


@dataclass(frozen=True)
class Chunk:
    """Rows that are projected together.

    Args:
        rows: Which rows.
        readers: Who reads them.
        counted: Whether agreement is counted here: rows are visited once for each grouping, but counted once.
    """

    rows: Rows
    readers: list[Reader]
    counted: bool = True


def rows_that_fit(vocab_size: int, device: torch.device) -> int:
    """How many rows to project at once: a power of two (so that the memory taken doesn't change with the number of
    rows), at least 16.

    Args:
        vocab_size: V.
        device: Where the logits are made.
    """
    room = min(CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE), free_bytes(device) // SHARE_OF_FREE_MEMORY)
    return 2 ** max(4, (room // (8 * vocab_size)).bit_length() - 1)


def free_bytes(device: torch.device) -> int:
    """Memory that is free now: of a GPU with what this process keeps in reserve, else the system's."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def plan_chunks(terms: Sequence[Term], layout: RowLayout, limit: int) -> list[Chunk]:
    """Decide what is projected together.

    Terms that compare no rows read small blocks; a term that compares rows reads each of its groups whole. Groupings
    that differ are projected separately, because their chunks can't be the same.

    Args:
        terms: The terms of the objective.
        layout: Where the N rows come from.
        limit: The most rows of a chunk; a larger group is a chunk of its own.
    """
    free: dict[bool, list[int]] = {}
    grouped: list[tuple[Tensor, list[int]]] = []
    for number, term in enumerate(terms):
        groups = term.loss.groups(layout)
        if groups is None:
            free.setdefault(term.loss.auxiliary, []).append(number)
            continue
        members = next((members for known, members in grouped if torch.equal(known, groups)), None)
        if members is None:
            grouped.append((groups, [number]))
        else:
            members.append(number)
    riders = [Reader(members, auxiliary=auxiliary) for auxiliary, members in free.items()]
    if not grouped:
        return [Chunk(rows, riders) for rows in _even_slices(len(layout), limit)]
    chunks = []
    for position, (groups, members) in enumerate(grouped):
        chunks += [
            Chunk(rows, [Reader(members, blocks, numbers), *(riders if position == 0 else [])], position == 0)
            for rows, blocks, numbers in _whole_groups(groups, limit)
        ]
    return chunks


def _even_slices(rows: int, limit: int) -> list[Rows]:
    """Slices of nearly equal size, none above the limit; one empty slice where there are no rows."""
    size = max(1, -(-rows // max(1, -(-rows // limit))))
    return [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]


def _whole_groups(groups: Tensor, limit: int) -> Iterator[tuple[Rows, list[slice], list[int]]]:
    """Indices of rows, a few whole groups at a time, with the extent and the number of each group within them."""
    order = torch.argsort(groups, stable=True)
    found, sizes = (one.tolist() for one in torch.unique_consecutive(groups[order], return_counts=True))
    start, filled, blocks, numbers = 0, 0, [], []
    for number, size in zip(found, sizes, strict=True):
        if blocks and filled + size > limit:
            yield order[start : start + filled], blocks, numbers
            start, filled, blocks, numbers = start + filled, 0, [], []
        blocks.append(slice(filled, filled + size))
        numbers.append(number)
        filled += size
    yield order[start : start + filled], blocks, numbers
