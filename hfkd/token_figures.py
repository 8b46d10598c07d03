"""What student and teacher say of single tokens, as columns of numbers: some twenty numbers a token, never a row of
the vocabulary.

Logits are made for a chunk of rows and forgotten before the next one. Where a number can't be known (a teacher of
which only the likeliest ids were kept) it is not a number (NaN), which the columns say and the report explains. Knows
no trainer and no text.

Shapes: n tokens, V ids, S entries of the support that both share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hfkd.chunks import BLOCK_VALUES
from hfkd.measures import brier_score, divergence, entropy, mass_on
from hfkd.objective import shared_vocabulary
from hfkd.plan import rows_that_fit
from hfkd.rows import DenseRows, TopKRows
from hfkd.support import TokenChunk
from hfkd.teacher_rows import LogitRows


@dataclass(frozen=True)
class SideFigures:
    """What one model says of n tokens.

    Args:
        top: [n] the id that it finds likeliest.
        confidence: [n] the probability of that one.
        log_prob: [n] log-probability (nats) of the text's token; NaN where it isn't known.
        brier: [n] squared distance to certainty of the text's token; NaN where it isn't known.
        entropy: [n] nats, on the support that both share.
        mass: [n] what it puts on the teacher's likeliest ids.
    """

    top: NDArray[np.int64]
    confidence: NDArray[np.float32]
    log_prob: NDArray[np.float32]
    brier: NDArray[np.float32]
    entropy: NDArray[np.float32]
    mass: NDArray[np.float32]


@dataclass(frozen=True)
class TokenFigures:
    """Columns of n tokens, in the order of the texts.

    Args:
        text: [n] the number of the text that each belongs to.
        position: [n] its place in the answer, from 0.
        target: [n] the id that the text has.
        forward_kl: [n] KL(teacher || student), nats.
        reverse_kl: [n] KL(student || teacher), nats.
        student: What the student says.
        teacher: What the teacher says.
    """

    text: NDArray[np.int64]
    position: NDArray[np.int64]
    target: NDArray[np.int64]
    forward_kl: NDArray[np.float32]
    reverse_kl: NDArray[np.float32]
    student: SideFigures
    teacher: SideFigures

    def __len__(self) -> int:
        return len(self.target)

    @property
    def agreed(self) -> NDArray[np.bool_]:
        """[n] whether both find the same token likeliest."""
        return self.student.top == self.teacher.top

    def of_texts(self, numbers: NDArray[np.int64], kept: int) -> TokenFigures:
        """Give the texts their numbers, and drop those that are there once more.

        Args:
            numbers: [T] the number of each text.
            kept: How many of the T are no repetitions; those come first.
        """
        chosen = self.select(self.text < kept)
        return replace(chosen, text=numbers[chosen.text])

    def select(self, which: NDArray) -> TokenFigures:
        """Some of the tokens."""
        return _each_column(lambda columns: columns[0][which], [self])


def join(parts: Sequence[TokenFigures]) -> TokenFigures:
    """All tokens of several, sorted by text; the order of the parts doesn't matter."""
    joined = _each_column(np.concatenate, parts)
    return joined.select(np.lexsort((joined.position, joined.text)))


def figures_of(
    student: DenseRows,
    teacher: LogitRows | TopKRows,
    targets: Tensor,
    text: Tensor,
    position: Tensor,
    *,
    top_k: int,
    chunk_size: int | None = None,
) -> TokenFigures:
    """Measure n tokens, a chunk at a time.

    Args:
        student: n rows.
        teacher: n rows.
        targets: [n] the ids that the text has.
        text: [n] the number of the text of each.
        position: [n] the place in the answer.
        top_k: How many of the teacher's likeliest ids the masses are taken over; no more than it lists.
        chunk_size: Rows projected at once; None chooses.
    """
    head, teacher = shared_vocabulary(student.head, teacher, targets)
    student = DenseRows(student.hidden, head).detached()
    sparse = isinstance(teacher, TopKRows)
    teacher = teacher if sparse else teacher.detached()
    size = chunk_size or rows_that_fit(student.vocab_size, targets.device)
    wide_dtype = torch.promote_types(student.hidden.dtype, torch.float32)
    buffers = [
        student.hidden.new_empty(min(size, len(targets)), width, dtype=wide_dtype)
        for width in [student.vocab_size, *([] if sparse else [teacher.vocab_size])]
    ]
    found: list[list[Tensor]] = []
    for rows in _slices(len(targets), size):
        ours = student.logits(rows, buffers[0])
        theirs = teacher.select(rows) if sparse else teacher.logits(rows, buffers[1])
        for block in _slices(ours.shape[0], _block_size(ours)):
            part = theirs.select(block) if sparse else theirs[block]
            found.append(_columns(TokenChunk(targets[rows][block], ours[block], part), top_k))
    columns = [torch.cat(some).cpu().numpy() for some in zip(*found, strict=True)]
    if not columns:
        columns = [column[:0] for column in _empty()]
    sides = [SideFigures(*columns[2 + place :: 2]) for place in range(2)]
    places = [values.cpu().numpy() for values in (text, position, targets)]
    return TokenFigures(*places, *columns[:2], *sides)


def _columns(chunk: TokenChunk, top_k: int) -> list[Tensor]:
    """Both divergences, then each figure of both sides, the student's first."""
    ours, theirs = chunk.log_probs()
    whole, targets = chunk.student_log_probs(), chunk.targets
    if chunk.sparse:
        place = chunk.top(1)[:, 0]
        top, target = chunk.top_ids(1)[:, 0], chunk.target_places()
    else:
        place = top = theirs.argmax(dim=-1)  # of several that are as likely both sides take the same
        target = targets
    said, unknown = _at(theirs, target), torch.full_like(ours[:, 0], torch.nan)
    return [
        *(divergence(theirs, ours), divergence(ours, theirs)),
        *(whole.argmax(dim=-1), top),
        *(whole.amax(dim=-1).exp(), _at(theirs, place).exp()),
        *(chunk.target_log_probs(), torch.where(target < chunk.listed, said, unknown)),
        *(brier_score(whole, targets), brier_score(theirs, target) if chunk.listed == chunk.vocab_size else unknown),
        *(entropy(ours), entropy(theirs)),
        *(mass_on(whole, chunk.top_ids(top_k)), mass_on(theirs, chunk.top(top_k))),
    ]


def _at(values: Tensor, places: Tensor) -> Tensor:
    """[n] one entry of each row of [n, S]."""
    return values.gather(-1, places[:, None])[:, 0]


def _slices(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _block_size(logits: Tensor) -> int:
    """Rows that stay in a CPU's cache between one step and the next; on other devices all of them."""
    return max(1, BLOCK_VALUES // logits.shape[-1]) if logits.device.type == "cpu" else max(1, len(logits))


def _empty() -> list[NDArray]:
    whole, real = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float32)
    return [real, real, whole, whole, *[real] * 10]


def _each_column(function: Callable[[Sequence[NDArray]], NDArray], parts: Sequence) -> Any:
    """The same kind of figures, each column made of those of the parts."""
    values = []
    for field in fields(parts[0]):
        columns = [getattr(part, field.name) for part in parts]
        nested = isinstance(columns[0], SideFigures)
        values.append(_each_column(function, columns) if nested else function(columns))
    return type(parts[0])(*values)
