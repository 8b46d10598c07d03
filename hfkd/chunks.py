"""The chunk runner: which rows are projected together, and the gradient that is taken while they are.

For each chunk it projects student and teacher once, lets every term read the rows a block at a time, takes
d(loss)/d(logits) by autograd there, and adds the gradients of the hidden states and of the head to their buffers at
once. Nothing is recomputed and no [N, V] tensor exists. It doesn't know what the terms measure.

Shapes: N supervised rows, c rows of a chunk, V ids, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hfkd.losses import TokenLoss
from hfkd.rows import DenseRows, Head, RowLayout, TopKRows
from hfkd.support import TokenChunk

CHUNK_BYTES = 2**28
"""What the two logit buffers of a chunk may take together when the number of rows is left to us."""

BLOCK_VALUES = 3 * 2**18
"""Logits that losses read at once on a CPU: small enough to stay in its cache between one elementwise step and the
next.
"""

Rows = Tensor | slice
"""Rows of a chunk within all rows: a slice, or indices where rows were put into groups."""


@dataclass(frozen=True)
class Term:
    """One summand of an objective.

    Args:
        name: How it is logged; unique within the objective.
        loss: What it measures, nats per token.
        weight: Its factor, >= 0.
    """

    name: str
    loss: TokenLoss
    weight: float = 1.0


@dataclass(frozen=True)
class Chunk:
    """Rows that are projected together.

    Args:
        rows: Which rows.
        readers: Terms (by number) and the blocks of the chunk that they read; None stands for blocks of any size.
        counted: Whether agreement is counted here: rows are visited once for each grouping, but counted once.
    """

    rows: Rows
    readers: list[tuple[list[int], list[slice] | None]]
    counted: bool = True


def plan_chunks(terms: Sequence[Term], layout: RowLayout, chunk_size: int | None, vocab_size: int) -> list[Chunk]:
    """Decide what is projected together.

    Terms that compare no rows read small blocks; a term that compares rows reads each of its groups whole. Groupings
    that differ are projected separately, because their chunks can't be the same.

    Args:
        terms: The terms of the objective.
        layout: Where the N rows come from.
        chunk_size: The most rows of a chunk (a larger group is a chunk of its own); None chooses by memory.
        vocab_size: V.
    """
    limit = chunk_size or max(16, CHUNK_BYTES // (8 * vocab_size))
    free: list[int] = []
    grouped: list[tuple[Tensor, list[int]]] = []
    for number, term in enumerate(terms):
        groups = term.loss.groups(layout)
        if groups is None:
            free.append(number)
            continue
        members = next((members for known, members in grouped if torch.equal(known, groups)), None)
        if members is None:
            grouped.append((groups, [number]))
        else:
            members.append(number)
    if not grouped:
        return [Chunk(rows, [(free, None)]) for rows in _even_slices(len(layout), limit)]
    chunks = []
    for position, (groups, members) in enumerate(grouped):
        riders = [(free, None)] if free and position == 0 else []
        chunks += [
            Chunk(rows, [(members, blocks), *riders], counted=position == 0)
            for rows, blocks in _whole_groups(groups, limit)
        ]
    return chunks


def _even_slices(rows: int, limit: int) -> list[Rows]:
    """Slices of nearly equal size, none above the limit; one empty slice where there are no rows."""
    size = max(1, -(-rows // max(1, -(-rows // limit))))
    return [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]


def _whole_groups(groups: Tensor, limit: int) -> Iterator[tuple[Rows, list[slice]]]:
    """Indices of rows, a few whole groups at a time, and the extent of each group within them."""
    order = torch.argsort(groups, stable=True)
    start, filled, blocks = 0, 0, []
    for size in torch.unique_consecutive(groups[order], return_counts=True)[1].tolist():
        if blocks and filled + size > limit:
            yield order[start : start + filled], blocks
            start, filled, blocks = start + filled, 0, []
        blocks.append(slice(filled, filled + size))
        filled += size
    yield order[start : start + filled], blocks


class Run:
    """One walk over all chunks.

    Args:
        terms: The terms of the objective.
        chunks: From `plan_chunks`.
        head: The student's head.
        teacher: The teacher's N rows, or None.
        targets: [N] token ids.
        weights: [N] factors of the rows, or None.
        parameters: Parameters of the losses that learn.
        measure_agreement: Whether to count rows with the same likeliest token.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        chunks: Sequence[Chunk],
        head: Head,
        teacher: DenseRows | TopKRows | None,
        targets: Tensor,
        weights: Tensor | None,
        parameters: Sequence[nn.Parameter],
        measure_agreement: bool = False,
    ) -> None:
        self.terms, self.chunks, self.targets, self.weights, self.parameters = (
            terms,
            chunks,
            targets,
            weights,
            parameters,
        )
        self.head = head.detached()
        self.teacher = teacher
        if isinstance(teacher, DenseRows):
            states, head = teacher.hidden.detach(), teacher.head.detached()
            self.teacher = DenseRows(states, replace(head, weight=head.weight.to(states.dtype)))
        self.agreed = (
            torch.zeros((), dtype=torch.long, device=targets.device)
            if measure_agreement and teacher is not None
            else None
        )
        self.with_gradient = torch.is_grad_enabled()

    def total(self, student: DenseRows) -> tuple[Tensor, list[Tensor]]:
        """Walk.

        Args:
            student: The N rows, in the graph.

        Returns:
            The weighted sum of the terms (nats) with its gradient, and each term's own sum.
        """
        inputs = (student.hidden, student.head.weight, student.head.bias, *self.parameters)
        total, *parts = _GradientInForward.apply(self, *inputs)
        return total, parts

    def walk(self, hidden: Tensor, buffers: _Buffers) -> list[Tensor]:
        """Visit every chunk, fill the buffers, return the sum of each term."""
        wide_dtype = torch.promote_types(hidden.dtype, torch.float32)
        sums = [torch.zeros((), dtype=wide_dtype, device=hidden.device) for _ in self.terms]
        weight = self.head.weight.to(hidden.dtype)
        # Made once: memory that is given back and asked for anew at each chunk has to be cleared by the system each
        # time.
        most = max(_count(chunk.rows) for chunk in self.chunks)
        both = [hidden.new_empty(most, self.head.vocab_size, dtype=wide_dtype) for _ in range(2 if self._dense else 1)]
        for chunk in self.chunks:
            states = hidden[chunk.rows]
            logits = _product(states, weight, both[0])
            teacher = self._teacher_chunk(chunk.rows, both[-1])
            # The logits of a block aren't needed any more once its gradient is known, unless another reader comes.
            gradient = logits if len(chunk.readers) == 1 else torch.zeros_like(logits)
            for place, (members, blocks) in enumerate(chunk.readers):
                count = self.agreed is not None and chunk.counted and place == 0
                for block in blocks if blocks is not None else _small_blocks(logits):
                    values, found = self._read(
                        members, chunk.rows, block, logits[block].detach(), teacher, buffers, count
                    )
                    for member, value in zip(members, values, strict=True):
                        sums[member] += value
                    if found is None:
                        continue
                    if gradient is logits:
                        gradient[block] = found
                    else:
                        gradient[block] += found
            if self.with_gradient:
                buffers.accumulate(chunk.rows, states, gradient, weight)
        return sums

    @property
    def _dense(self) -> bool:
        return isinstance(self.teacher, DenseRows)

    def _teacher_chunk(self, rows: Rows, buffer: Tensor) -> Tensor | TopKRows | None:
        if self._dense:
            states = self.teacher.hidden[rows]
            return _product(states, self.teacher.head.weight, buffer)
        return _cut(self.teacher, rows)

    def _read(
        self,
        members: Sequence[int],
        rows: Rows,
        block: slice,
        leaf: Tensor,
        teacher: Tensor | TopKRows | None,
        buffers: _Buffers,
        count: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Let the terms read one block; returns their sums and the gradient of the block's products with the head."""
        head, theirs = self.head, teacher
        if isinstance(teacher, TopKRows):
            theirs = _cut(teacher, block)
        elif teacher is not None:
            theirs = self.teacher.head.finish(teacher[block])
        inputs = [leaf.requires_grad_(self.with_gradient)]
        if buffers.bias is not None:
            head = replace(head, bias=head.bias.detach().requires_grad_())
            inputs.append(head.bias)
        with torch.set_grad_enabled(self.with_gradient):
            chunk = TokenChunk(self.targets[rows][block], head.finish(leaf), theirs)
            values = [_row_values(self.terms[member], chunk) for member in members]
            if self.weights is not None:
                values = [value * self.weights[rows][block] for value in values]
            values = [value.sum() for value in values]
            total = torch.stack(
                [self.terms[member].weight * value for member, value in zip(members, values, strict=True)]
            ).sum()
        if count:
            self.agreed += chunk.agreement()
        if not self.with_gradient:
            return values, None
        found = torch.autograd.grad(total, [*inputs, *self.parameters], allow_unused=True)
        buffers.add(found[1:])
        return [value.detach() for value in values], found[0]


def _row_values(term: Term, chunk: TokenChunk) -> Tensor:
    """What a term says of each row; one that says one number for all would change its weight with the chunk."""
    values = term.loss(chunk)
    if values.shape != (len(chunk),):
        raise ValueError(
            f"The loss {term.name!r} returned a tensor of shape {list(values.shape)} for {len(chunk)} tokens; "
            f"expected one "
            f"value per token, [{len(chunk)}]. Sum over the vocabulary only (`.sum(dim=-1)`) and take no mean over "
            f"tokens."
        )
    return values


def _count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else rows.shape[0]


def _product(states: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """`states @ weight.T` in the first rows of a buffer that may be wider in type."""
    out = buffer[: states.shape[0]]
    if states.dtype == buffer.dtype:
        return torch.mm(states, weight.T, out=out)
    return out.copy_(torch.mm(states, weight.T))


def _small_blocks(logits: Tensor) -> Iterator[slice]:
    """Blocks that fit a CPU's cache; on an accelerator the whole chunk, where few large kernels are what is fast."""
    rows, width = logits.shape
    size = max(1, BLOCK_VALUES // width) if logits.device.type == "cpu" else max(1, rows)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _cut(rows: TopKRows | None, which: Rows) -> TopKRows | None:
    return None if rows is None else replace(rows, ids=rows.ids[which], log_probs=rows.log_probs[which])


class _Buffers:
    """Gradients under way. The head's are summed in float32 (or wider): a sum of many small numbers in bfloat16 is
    biased.
    """

    def __init__(self, hidden: Tensor, head: Head, needed: Sequence[bool], parameters: Sequence[nn.Parameter]) -> None:
        wide_dtype = torch.promote_types(head.weight.dtype, torch.float32)
        self.hidden = torch.zeros(hidden.shape, dtype=wide_dtype, device=hidden.device) if needed[0] else None
        self.weight = torch.zeros(head.weight.shape, dtype=wide_dtype, device=hidden.device) if needed[1] else None
        self.bias = torch.zeros(head.bias.shape, dtype=wide_dtype, device=hidden.device) if needed[2] else None
        self.parameters = [torch.zeros_like(parameter) for parameter in parameters]

    def add(self, found: Sequence[Tensor | None]) -> None:
        """Add the gradients of the bias (if it learns) and of the losses' parameters."""
        buffers = ([] if self.bias is None else [self.bias]) + self.parameters
        for buffer, gradient in zip(buffers, found, strict=True):
            if gradient is not None:
                buffer += gradient

    def accumulate(self, rows: Rows, states: Tensor, gradient: Tensor, weight: Tensor) -> None:
        """Carry the gradient of a chunk's products [c, V] on to the hidden states and to the head."""
        if self.hidden is not None:
            # A sum, because rows are visited once for each grouping.
            self.hidden[rows] += torch.mm(gradient.to(weight.dtype), weight)
        if self.weight is not None:
            self.weight.addmm_(gradient.T.to(self.weight.dtype), states.to(self.weight.dtype))


class _GradientInForward(torch.autograd.Function):
    """The weighted sum over all rows; its gradients are ready when the value is, backward only scales them."""

    @staticmethod
    def forward(ctx, run: Run, hidden: Tensor, weight: Tensor, bias: Tensor | None, *parameters: nn.Parameter):
        needed = [
            run.with_gradient and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
        ]
        run.with_gradient = any(needed) or (run.with_gradient and bool(parameters))
        buffers = _Buffers(hidden, run.head, needed, parameters)
        with torch.autocast(hidden.device.type, enabled=False):
            sums = run.walk(hidden.detach(), buffers)
        ctx.buffers, ctx.dtypes = buffers, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        total = torch.stack([term.weight * value for term, value in zip(run.terms, sums, strict=True)]).sum()
        ctx.mark_non_differentiable(*sums)
        return total, *sums

    @staticmethod
    def backward(ctx, grad_total: Tensor, *_: Tensor | None):
        if ctx.buffers is None:
            raise RuntimeError(
                "backward ran twice through one objective; its gradients were handed out already. Call the objective "
                "again."
            )
        buffers, ctx.buffers = ctx.buffers, None
        gradients = [buffers.hidden, buffers.weight, buffers.bias, *buffers.parameters]
        dtypes = [*ctx.dtypes, *(None for _ in buffers.parameters)]
        scaled = (None if one is None else one.mul_(grad_total.to(one.dtype)) for one in gradients)
        return None, *(
            one if one is None or dtype is None else one.to(dtype) for one, dtype in zip(scaled, dtypes, strict=True)
        )
