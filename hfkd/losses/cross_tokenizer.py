"""Teachers that cut text into other tokens: what can be compared without the ids meaning the same.

`ULD` compares how a probability mass is spread, whatever it is spread over; `SpanLikelihood` compares how likely both
find the same piece of text. With a teacher of the student's vocabulary both work too: each token is a span.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hfkd.losses.base import Divergence, Temperature
from hfkd.losses.slope import with_slope
from hfkd.rows import LOWEST, RowLayout
from hfkd.support import TokenChunk

_RUN = 64
"""Rows whose spans are read together, so that there are not as many readings as spans."""


class ULD(Divergence):
    """Punishes a student whose probabilities, sorted, differ from the teacher's: it is as sure and as torn as the
    teacher, whatever the tokens are.

    Formula:
        sum_i |p_(i) - q_(i)|, p_(i) and q_(i) the i-th largest probability of the teacher and of the student, the
        shorter vocabulary filled up with zeros.
    Args:
        top: Compare so many of the largest and what is left as one entry, >= 1; None compares all. Saves sorting.
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        Both distributions, of a teacher with another vocabulary at the first token of each span: there both have read
        the same text. Its other rows cost 0. Of sparse rows the listed ids and the tail, an entry like the others.
    Cost:
        O(V log V) per token to sort both; O(V) with `top`.
    Undefined:
        Its gradient jumps where p_(i) = q_(i), where it is taken as 0, and where two of the student's probabilities
        change places. A distance of sorted probabilities, not nats.
    Paper:
        Boizard et al., 2024, https://arxiv.org/abs/2402.12030. That it is read at the beginnings of spans instead of
        position by position, and `top`, are ours.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.2, 0.7, 0.1]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> round(ULD().between(student, teacher).item(), 4)
        0.4
    """

    reads_other_vocabulary = True
    may_stand_alone = False
    why_not_alone = "it doesn't see which token has which probability."

    def __init__(
        self,
        top: int | None = None,
        temperature: Temperature = 1.0,
        scale_by_temperature_squared: bool = True,
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
            raise ValueError(f"{self.key}: top is {top!r}; expected a number of at least 1, or null for all tokens.")
        self.top = top

    def compare(self, chunk: TokenChunk) -> Tensor:
        """Return [n], the distance; 0 in rows that have none of the teacher's beside them."""
        if chunk.aligned is None:
            return self.between(*chunk.log_probs(self.temperature))
        rows = chunk.aligned.nonzero()[:, 0]
        chunk.measure("aligned", chunk.aligned.to(torch.float32))
        student, teacher = chunk.student_log_probs(self.temperature), chunk.teacher_log_probs(self.temperature)
        values = self.between(student[rows], teacher[rows])
        return values.new_zeros(len(chunk)).index_add(0, rows, values)

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], the distance of the sorted probabilities; the two may have different vocabularies."""
        with torch.no_grad():
            ours = student.exp()
            size = max(student.shape[-1], teacher.shape[-1])
            if self.top is None or self.top >= size - 1:
                values, slope = _sorted_distance(ours, teacher.exp())
            else:
                values, slope = _top_distance(ours, teacher.exp(), self.top)
        return with_slope(student, values, slope)

    def settings(self) -> dict[str, Any]:
        """How many of the largest are compared, and what every divergence has."""
        return {"top": self.top, **super().settings()}


def _sorted_distance(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """[n] the distance of all probabilities, and its derivative by the student's log-probabilities."""
    ranked, order = ours.sort(dim=-1, descending=True, stable=True)
    likely = theirs.sort(dim=-1, descending=True).values
    size = max(ours.shape[-1], theirs.shape[-1])
    gap = _filled(ranked, size).sub_(_filled(likely, size))
    values = gap.abs().sum(dim=-1)
    slope = torch.empty_like(ours).scatter_(-1, order, gap[:, : ours.shape[-1]].sign_()).mul_(ours)
    return values, slope


def _top_distance(ours: Tensor, theirs: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The same of the `top` largest, and of what is left as one entry."""
    ranked, order = ours.topk(min(top, ours.shape[-1]), dim=-1)
    likely = theirs.topk(min(top, theirs.shape[-1]), dim=-1).values
    rest = (ours.sum(dim=-1) - ranked.sum(dim=-1)) - (theirs.sum(dim=-1) - likely.sum(dim=-1))
    gap = _filled(ranked, top) - _filled(likely, top)
    values = gap.abs().sum(dim=-1) + rest.abs()
    signs = rest.sign()[:, None].expand_as(ours).scatter(-1, order, gap[:, : order.shape[-1]].sign())
    return values, signs * ours


def _filled(values: Tensor, size: int) -> Tensor:
    """Rows of `size` entries, zeros behind those that there are; a copy."""
    return torch.nn.functional.pad(values, (0, size - values.shape[-1])) if size > values.shape[-1] else values.clone()


class SpanLikelihood(Divergence):
    """Punishes a student that finds a piece of the text likelier or less likely than the teacher does.

    Formula:
        P log(P / Q) + (1 - P) log((1 - P) / (1 - Q)) for a span of the text, P = P_t^power, Q = P_s^power, P_t and P_s
        the probability that teacher and student give to the text of the span: the product over its tokens. Charged to
        the span's first row, its other rows cost 0.
    Args:
        power: The exponent, > 0; below 1 it lifts small probabilities and so the pull on them (1 / temperature in the
            paper).
    Reads:
        The student's probability of the text's own tokens, and the teacher's of the same text. A teacher of the same
        vocabulary makes every token a span; of its sparse rows, a token that isn't listed is the tail.
    Cost:
        O(V) per token.
    Undefined:
        Nowhere for finite logits. Nats of a yes or no about each span, not of its tokens.
    Paper:
        Minixhofer, Vulic and Ponti (approximate likelihood matching), 2025, https://arxiv.org/abs/2503.20083, with the
        forward KL as the binary divergence and no weighting of spans by their bias.
    Example:
        >>> import torch
        >>> from hfkd.support import TokenChunk
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> round(SpanLikelihood()(TokenChunk.from_logits(torch.tensor([0]), student, teacher)).item(), 4)
        0.3681
    """

    reads_other_vocabulary = True

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        if not 0 < power < math.inf:
            raise ValueError(
                f"{self.key}: power is {power}; expected a number above 0 (1 leaves probabilities as they are)."
            )
        self.power = float(power)

    def groups(self, layout: RowLayout) -> Tensor | None:
        """Return [N], some whole spans a group; None where every token is a span."""
        if layout.spans is None or len(layout) == 0:
            return layout.spans
        first = torch.ones_like(layout.spans, dtype=torch.bool)
        first[1:] = layout.spans[1:] != layout.spans[:-1]
        rows = torch.arange(len(layout), device=first.device)
        return torch.where(first, rows, 0).cummax(dim=0).values // _RUN  # by the row that a span begins with

    def compare(self, chunk: TokenChunk) -> Tensor:
        """Return [n], the divergence of each span at its first row."""
        if chunk.span is None:
            student, teacher = chunk.log_probs()
            places = chunk.target_places()
            return self._binary(*_of_text(student, places), *_of_text(teacher, places))
        likely, unlikely = _of_spans(*_of_text(chunk.student_log_probs(), chunk.targets), chunk.span)
        theirs = chunk.span_log_probs.to(likely.dtype)
        values = self._binary(likely, unlikely, theirs, _log_complement(theirs))
        return torch.where(chunk.aligned, values, 0.0)

    def _binary(self, ours: Tensor, ours_not: Tensor, theirs: Tensor, theirs_not: Tensor) -> Tensor:
        """[n] the divergence, given the logarithms of P and 1 - P of both sides before the exponent."""
        if self.power != 1.0:
            ours_not = ours_not + _log_ratio(ours, self.power)
            theirs_not = theirs_not + _log_ratio(theirs, self.power)
            ours, theirs = self.power * ours, self.power * theirs
        values = theirs.exp() * (theirs - ours) + theirs_not.exp() * (theirs_not - ours_not)
        return values - values.detach().clamp(max=0.0)  # rounding must not make it negative; the gradient stays

    def settings(self) -> dict[str, Any]:
        """The exponent."""
        return {"power": self.power}


def _of_text(log_probs: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """[n] the log-probability of one column in each row of [n, S], and that of all others together: exact where the
    one is nearly certain, as 1 minus its probability wouldn't be.
    """
    likely = log_probs.gather(-1, places[:, None])[:, 0]
    with torch.no_grad():
        others = log_probs.scatter(-1, places[:, None], -math.inf)
        unlikely = others.logsumexp(dim=-1).clamp(min=LOWEST)
        slope = others.sub_(unlikely[:, None]).exp_()
    return likely, with_slope(log_probs, unlikely, slope) if log_probs.requires_grad else unlikely


def _of_spans(likely: Tensor, unlikely: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
    """[n] the log-probability of the span that a row belongs to, and of every other text. The first token differs, or
    it is right and the second differs, and so on: a sum without cancellation.
    """
    same = span[:, None] == span[None, :]
    before = (same.tril(-1) * likely[None, :]).sum(dim=-1)
    ways = (before + unlikely)[None, :].masked_fill(~same, -math.inf)
    return (same * likely[None, :]).sum(dim=-1), ways.logsumexp(dim=-1)


def _log_complement(log_probs: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0; its exponential is exactly 0 where float32 can't tell x from 0."""
    rest = -torch.expm1(log_probs)
    return torch.where(rest > 0, rest.clamp(min=torch.finfo(rest.dtype).tiny).log(), LOWEST)


def _log_ratio(log_probs: Tensor, power: float) -> Tensor:
    """log((1 - P^power) / (1 - P)) for x = log P: from log(power) at P = 1 to 0 at P = 0."""
    near = log_probs > -1e-3
    apart = torch.where(near, -1.0, log_probs)
    exact = torch.expm1(power * apart).div(torch.expm1(apart)).log()
    series = math.log(power) + 0.5 * (power - 1) * log_probs + (power**2 - 1) / 24 * log_probs**2
    return torch.where(near, series, exact)
