"""The chunk runner: which rows are projected together, and the gradient that is taken while they are.

For each chunk it projects student and teacher once, lets every term read the rows a block at a time, takes
d(loss)/d(logits) by autograd there, and adds the gradients of the hidden states and of the head to their buffers at
once. Nothing is recomputed and no [N, V] tensor exists. It doesn't know what the terms measure.

Shapes: N supervised rows, c rows of a chunk, V ids, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hfkd.plan import Chunk, Reader, Rows, Term
from hfkd.rows import DenseRows, Head, TopKRows, product
from hfkd.support import Tail, TokenChunk
from hfkd.teacher_rows import AlignedRows, LogitRows, SampledRows, TeacherRows

BLOCK_VALUES = 3 * 2**18
"""Logits that losses read at once on a CPU: small enough to stay in its cache between one elementwise step and the
next.
"""


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
        tail: What becomes of the mass outside a sparse teacher's ids.
        read: What reads a block: `read_block`, or what `torch.compile` made of it.
        private: [N] how private each token is, or None.

    Attributes:
        measures: Sums over the rows of the figures that losses noted, by `<term>/<name>`.
        agreed: The number of rows that agree, or None.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        chunks: Sequence[Chunk],
        head: Head,
        teacher: TeacherRows | None,
        targets: Tensor,
        weights: Tensor | None,
        parameters: Sequence[nn.Parameter],
        measure_agreement: bool = False,
        tail: Tail = "bucket",
        read: ReadBlock | None = None,
        private: Tensor | None = None,
    ) -> None:
        self.terms, self.chunks, self.targets, self.weights = terms, chunks, targets, weights
        self.private = private
        self.parameters, self.tail, self.read = parameters, tail, read or read_block
        self.head = head.detached()
        self.listed = isinstance(teacher, TopKRows | SampledRows)
        self.teacher = teacher if teacher is None or self.listed else teacher.detached()
        counting = measure_agreement and isinstance(teacher, LogitRows | TopKRows)
        self.agreed = torch.zeros((), dtype=torch.long, device=targets.device) if counting else None
        self.measures: dict[str, Tensor] = {}
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
        ours = hidden.new_empty(most, self.head.vocab_size, dtype=wide_dtype)
        dense = self.teacher is not None and not self.listed
        theirs = hidden.new_empty(most, self.teacher.vocab_size, dtype=wide_dtype) if dense else None
        for chunk in self.chunks:
            states = hidden[chunk.rows]
            logits = product(states, weight, ours)
            work = _Work(chunk, states, logits, self._teacher_chunk(chunk.rows, theirs))
            for place, reader in enumerate(chunk.readers):
                self._let_read(work, reader, buffers, sums, self.agreed is not None and chunk.counted and place == 0)
            if self.with_gradient:
                buffers.accumulate(chunk.rows, states, work.gradient, work.beside, weight)
        return sums

    def _let_read(self, work: _Work, reader: Reader, buffers: _Buffers, sums: list[Tensor], count: bool) -> None:
        """Let one reader go over a chunk, and add up what it says."""
        blocks = reader.blocks if reader.blocks is not None else _small_blocks(work.logits)
        for place, block in enumerate(blocks):
            group = reader.numbers[place] if reader.numbers is not None else None
            chunk, inputs = self._open(work, reader, block, group, buffers.bias is not None)
            rows = work.chunk.rows
            weights = None if self.weights is None else self.weights[rows][block]
            with torch.set_grad_enabled(self.with_gradient):
                values = self.read([self.terms[member] for member in reader.members], chunk, weights)
                factors = [self.terms[member].weight for member in reader.members]
                total = sum(factor * value for factor, value in zip(factors, values, strict=True))
            for member, value in zip(reader.members, values, strict=True):
                sums[member] += value.detach()
            self._note(chunk.measures)
            if count:
                self.agreed += chunk.agreement()
            if self.with_gradient and not total.requires_grad:
                work.add(reader, block, None)  # nothing to say of these rows
            elif self.with_gradient:
                found = torch.autograd.grad(total, [*inputs.tensors, *self.parameters], allow_unused=True)
                work.add(reader, block, found[0])
                buffers.add(found[1:], inputs, rows, block)

    def _open(
        self, work: _Work, reader: Reader, block: slice, group: int | None, with_bias: bool
    ) -> tuple[TokenChunk, _Inputs]:
        """The block as its reader sees it, and what its gradient is asked for."""
        head, theirs = self.head, work.teacher
        if self.listed:
            theirs = theirs.select(block)
        elif theirs is not None:
            theirs = theirs[block]
            if isinstance(self.teacher, DenseRows):
                theirs = self.teacher.head.finish(theirs)  # a block at a time: it stays in a CPU's cache
        leaf = work.logits[block].detach().requires_grad_(self.with_gradient)
        hidden = bias = None
        if reader.auxiliary:
            hidden = work.states[block].detach().requires_grad_(self.with_gradient)
        elif with_bias:
            bias = head.bias.detach().requires_grad_()
            head = replace(head, bias=bias)
        with torch.set_grad_enabled(self.with_gradient):
            logits = head.finish(leaf)
        targets = self.targets[work.chunk.rows][block]
        beside = None
        if isinstance(self.teacher, AlignedRows):
            beside = self.teacher.alignment(work.chunk.rows).select(block)
        private = None if self.private is None else self.private[work.chunk.rows][block]
        chunk = TokenChunk(
            targets, logits, theirs, tail=self.tail, hidden=hidden, group=group, alignment=beside, private=private
        )
        return chunk, _Inputs(leaf, bias, hidden)

    def _note(self, measures: dict[str, Tensor]) -> None:
        for name, values in measures.items():
            total = values.sum()
            self.measures[name] = self.measures[name] + total if name in self.measures else total

    def _teacher_chunk(self, rows: Rows, buffer: Tensor | None) -> Tensor | TopKRows | SampledRows | None:
        if self.teacher is None or self.listed:
            return None if self.teacher is None else self.teacher.select(rows)
        if isinstance(self.teacher, DenseRows):
            return self.teacher.products(rows, buffer)
        return self.teacher.logits(rows, buffer)


def read_block(terms: Sequence[Term], chunk: TokenChunk, weights: Tensor | None) -> list[Tensor]:
    """What each term says of a block, summed over its rows.

    Args:
        terms: Who reads.
        chunk: The n rows; what the terms note of it is left there under `<term>/<name>`.
        weights: [n] factors of the rows, or None.
    """
    sums, noted = [], {}
    for term in terms:
        values = _row_values(term, chunk)
        if chunk.private is not None and term.loss.learns_text:
            values = values * (1 - chunk.private)  # else the text itself would give away what the teacher doesn't
        sums.append((values if weights is None else values * weights).sum())
        noted |= {f"{term.name}/{name}": found for name, found in chunk.measures.items()}
        chunk.measures = {}
    chunk.measures = noted
    return sums


ReadBlock = Callable[[Sequence[Term], TokenChunk, Tensor | None], list[Tensor]]
"""The form of `read_block`."""


@dataclass(frozen=True)
class _Inputs:
    """What a block's gradient is asked for: its products with the head, and the head's bias and the hidden states
    where something learns from them.
    """

    logits: Tensor
    bias: Tensor | None
    hidden: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        return [one for one in (self.logits, self.bias, self.hidden) if one is not None]


class _Work:
    """A chunk in work: its logits, and the gradients of its products that are still to be carried on.

    `gradient` goes to the head and to the hidden states, `beside` to the hidden states alone.
    """

    def __init__(
        self, chunk: Chunk, states: Tensor, logits: Tensor, teacher: Tensor | TopKRows | SampledRows | None
    ) -> None:
        self.chunk, self.states, self.logits, self.teacher = chunk, states, logits, teacher
        plain = any(not reader.auxiliary for reader in chunk.readers)
        # The logits of a block aren't needed any more once its gradient is known, unless another reader comes.
        self.in_place = len(chunk.readers) == 1
        fresh = logits if self.in_place else torch.zeros_like(logits)
        self.gradient = fresh if plain else None
        self.beside = None
        if any(reader.auxiliary for reader in chunk.readers):
            self.beside = torch.zeros_like(logits) if plain else fresh

    def add(self, reader: Reader, block: slice, found: Tensor | None) -> None:
        """Take the gradient of a block's products."""
        kept = self.beside if reader.auxiliary else self.gradient
        if self.in_place:
            kept[block] = 0 if found is None else found
        elif found is not None:
            kept[block] += found


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


def _small_blocks(logits: Tensor) -> Iterator[slice]:
    """Blocks that fit a CPU's cache; on an accelerator the whole chunk, where few large kernels are what is fast."""
    rows, width = logits.shape
    size = max(1, BLOCK_VALUES // width) if logits.device.type == "cpu" else max(1, rows)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


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

    def add(self, found: Sequence[Tensor | None], inputs: _Inputs, rows: Rows, block: slice) -> None:
        """Add the gradients of the bias, of the hidden states that were read directly, and of the losses' parameters,
        each where there is one.
        """
        rest = iter(found)
        if inputs.bias is not None and (gradient := next(rest)) is not None:
            self.bias += gradient
        if inputs.hidden is not None and (gradient := next(rest)) is not None and self.hidden is not None:
            self.hidden[_within(rows, block)] += gradient
        for buffer, gradient in zip(self.parameters, rest, strict=True):
            if gradient is not None:
                buffer += gradient

    def accumulate(
        self, rows: Rows, states: Tensor, gradient: Tensor | None, beside: Tensor | None, weight: Tensor
    ) -> None:
        """Carry the gradient of a chunk's products [c, V] on to the hidden states and to the head."""
        if self.weight is not None and gradient is not None:
            _add_product(self.weight, gradient, states)
        if self.hidden is not None:
            if beside is not None:
                gradient = beside if gradient is None else gradient.add_(beside)
            # A sum, because rows are visited once for each grouping.
            self.hidden[rows] += torch.mm(gradient.to(weight.dtype), weight)


def _add_product(total: Tensor, gradient: Tensor, states: Tensor) -> None:
    """`total += gradient.T @ states`, summed in the type of `total`."""
    if states.dtype == torch.bfloat16 and states.device.type == "cuda":
        # Products of bfloat16 with float32 sums: as wide as needed, many times faster than float32 products.
        total += torch.mm(gradient.T.to(states.dtype), states, out_dtype=total.dtype)
    else:
        total.addmm_(gradient.T.to(total.dtype), states.to(total.dtype))


def _within(rows: Rows, block: slice) -> Rows:
    """A block of a chunk's rows, within all rows."""
    if isinstance(rows, slice):
        return slice(rows.start + block.start, rows.start + block.stop)
    return rows[block]


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
