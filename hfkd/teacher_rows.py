"""Rows that only a teacher has: drawn ones, several teachers', and those of a teacher with another vocabulary.

`hfkd.rows` has the two forms that one model's distributions take. What is here is put together from them and is read
through `hfkd.support.TokenChunk`; nothing here knows a loss or a prompt.

Shapes: N supervised rows, c rows of a chunk, V ids, K drawn ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfkd.rows import DenseRows, TopKRows


@dataclass(frozen=True)
class SampledRows:
    """Ids that were drawn from each row's distribution: sums over them are right on average, for whatever is linear in
    the distribution, and for nothing else.

    Args:
        ids: [N, K] token ids, distinct within a row; 0 where a row has fewer than K.
        log_probs: [N, K] the true log-probabilities (nats) of these ids; 0 where a row has fewer.
        weights: [N, K] so that the mean over draws of `sum_k weights[k] f(ids[k])` is `sum_v p(v) f(v)`; 0 where a row
            has fewer.
        vocab_size: The number V of ids that the distribution was taken over.
        temperature: The temperature that the distribution was taken at.
    """

    ids: Tensor
    log_probs: Tensor
    weights: Tensor
    vocab_size: int
    temperature: float = 1.0

    def __len__(self) -> int:
        return self.ids.shape[0]

    def select(self, which: Tensor | slice) -> SampledRows:
        """Some of the rows."""
        return replace(self, ids=self.ids[which], log_probs=self.log_probs[which], weights=self.weights[which])


@dataclass(frozen=True)
class MixtureRows:
    """A weighted mean of several teachers' distributions, `p = sum_i w_i softmax(z_i)`.

    The mean is taken at temperature 1; a loss's temperature then divides log p, as it divides any teacher's logits.

    Args:
        members: The N rows of each teacher. Where their vocabularies are padded to different sizes, all are cut to the
            smallest.
        weights: Of the members, above 0 and summing to 1.
    """

    members: tuple[DenseRows, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse what is no mean."""
        if len(self.members) != len(self.weights) or not self.members:
            raise ValueError(
                f"A mixture has {len(self.members)} members and {len(self.weights)} weights; expected one each."
            )
        if min(self.weights) <= 0 or abs(sum(self.weights) - 1.0) > 1e-6:
            raise ValueError(f"A mixture's weights are {self.weights}; expected numbers above 0 that sum to 1.")
        counts = [len(member) for member in self.members]
        if len(set(counts)) > 1:
            raise ValueError(f"The members of a mixture have {counts} rows; expected as many each.")

    def __len__(self) -> int:
        return len(self.members[0])

    @property
    def vocab_size(self) -> int:
        """The number V of ids that all members score."""
        return min(member.vocab_size for member in self.members)

    def first(self, vocab_size: int) -> MixtureRows:
        """All members over the first `vocab_size` ids only."""
        return replace(self, members=tuple(member.first(vocab_size) for member in self.members))

    def detached(self) -> MixtureRows:
        """The same outside the graph, all members cut to the ids that they share."""
        return replace(self, members=tuple(member.first(self.vocab_size).detached() for member in self.members))

    def logits(self, which: Tensor | slice, buffer: Tensor) -> Tensor:
        """[c, V] log p of some rows, in the dtype of a buffer [>= c, V] that may be used for it."""
        found: Tensor | None = None
        for member, weight in zip(self.members, self.weights, strict=True):
            logits = member.logits(which, buffer)
            own = torch.log_softmax(logits, dim=-1).add_(math.log(weight))
            found = own if found is None else torch.logaddexp(found, own, out=found)
        return found


@dataclass(frozen=True)
class RoutedRows:
    """Rows of which each comes from one of several teachers.

    Args:
        members: The rows of each teacher that has any.
        member: [N] which member a row comes from.
        place: [N] which of that member's rows it is.
    """

    members: tuple[DenseRows, ...]
    member: Tensor
    place: Tensor

    def __len__(self) -> int:
        return self.member.shape[0]

    @property
    def vocab_size(self) -> int:
        """The number V of ids that all members score."""
        return min(member.vocab_size for member in self.members)

    def first(self, vocab_size: int) -> RoutedRows:
        """All members over the first `vocab_size` ids only."""
        return replace(self, members=tuple(member.first(vocab_size) for member in self.members))

    def detached(self) -> RoutedRows:
        """The same outside the graph, all members cut to the ids that they share."""
        return replace(self, members=tuple(member.first(self.vocab_size).detached() for member in self.members))

    def logits(self, which: Tensor | slice, buffer: Tensor) -> Tensor:
        """[c, V] logits of some rows, written into a buffer [>= c, V]."""
        member, place = self.member[which], self.place[which]
        out = buffer[: member.shape[0]]
        for number, rows in enumerate(self.members):
            chosen = (member == number).nonzero()[:, 0]
            if chosen.numel():
                scratch = out.new_empty(chosen.shape[0], out.shape[1])
                out[chosen] = rows.logits(place[chosen], scratch)
        return out


@dataclass(frozen=True)
class AlignedRows:
    """Rows of a teacher with another vocabulary, beside the student's rows that predict the same text.

    Args:
        rows: M rows of the teacher, over its own ids.
        place: [N] the teacher's row beside each row of the student, -1 where there is none.
        span: [N] the number of the stretch of text that each of the student's tokens belongs to; equal numbers lie
            side by side.
        span_log_probs: [N] the teacher's log-probability (nats) of the whole stretch, the same for all its rows.
    """

    rows: DenseRows
    place: Tensor
    span: Tensor
    span_log_probs: Tensor

    def __len__(self) -> int:
        return self.place.shape[0]

    @property
    def vocab_size(self) -> int:
        """The number of ids of the teacher's own vocabulary."""
        return self.rows.vocab_size

    def detached(self) -> AlignedRows:
        """The same outside the graph."""
        return replace(self, rows=self.rows.detached())

    def logits(self, which: Tensor | slice, buffer: Tensor) -> Tensor:
        """[c, V] the teacher's logits of some rows, zeros where there is no row beside, in a buffer [>= c, V]."""
        place = self.place[which]
        out = buffer[: place.shape[0]].zero_()
        chosen = (place >= 0).nonzero()[:, 0]
        if chosen.numel():
            out[chosen] = self.rows.logits(place[chosen], out.new_empty(chosen.shape[0], out.shape[1]))
        return out

    def alignment(self, which: Tensor | slice) -> Alignment:
        """What a chunk of some rows is told."""
        return Alignment(self.place[which] >= 0, self.span[which], self.span_log_probs[which])


@dataclass(frozen=True)
class Alignment:
    """How the n rows of a chunk lie beside a teacher that cuts the text in another way.

    Args:
        aligned: [n] booleans: whether the teacher has a row that predicts the same text.
        span: [n] the number of the stretch of text.
        span_log_probs: [n] the teacher's log-probability (nats) of that stretch.
    """

    aligned: Tensor
    span: Tensor
    span_log_probs: Tensor

    def select(self, which: Tensor | slice) -> Alignment:
        """Some of the rows."""
        return Alignment(self.aligned[which], self.span[which], self.span_log_probs[which])


LogitRows = DenseRows | MixtureRows | RoutedRows
"""Rows that say something of every id of the student's vocabulary."""

TeacherRows = LogitRows | TopKRows | SampledRows | AlignedRows
"""Whatever a teacher may hand to the losses."""
