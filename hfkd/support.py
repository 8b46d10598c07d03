"""What a loss reads: a few supervised tokens, student and teacher side by side on one support.

The support is the whole vocabulary where the teacher's rows are dense, or the teacher's top-k ids plus one tail bucket
where they are sparse. A `TokenChunk` holds logits of a handful of rows, made by the objective's chunk runner, and
hands out log-probabilities in float32. It doesn't know where they come from or what becomes of the loss.

Shapes: n tokens, V ids, K ids of a sparse teacher, S entries of a support, U ids that several rows share.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from hfkd.rows import LOWEST, TopKRows
from hfkd.teacher_rows import Alignment, SampledRows

SMALLEST_TAIL = math.log(2.0**-24)
"""The log-probability that a sparse teacher's tail has at least, because its float32 log-probabilities can't tell."""

_FEW_ROWS = 16

Tail = Literal["bucket", "renormalize"]
"""What becomes of the mass outside a sparse teacher's ids: one more entry, or nothing, both sides summing to 1 without
it.
"""


def wide(values: Tensor) -> Tensor:
    """Raise half precision to float32; float32 and float64 stay what they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


class TokenChunk:
    """Some supervised tokens, as logits of the student and what the teacher says of them.

    Args:
        targets: [n] the ids that the tokens really have.
        student_logits: [n, V] the student's logits.
        teacher: [n, V] the teacher's logits, its `TopKRows` or `SampledRows` of n rows, or None for losses that need
            no teacher. With an alignment [n, V'], over the ids of the teacher's own vocabulary.
        tail: What becomes of the mass outside the ids of a sparse teacher.
        hidden: [n, H] the student's last hidden states, for losses with a head of their own; else None.
        group: The number of the group that these rows are, for losses that compare rows; else None.
        alignment: How the rows lie beside those of a teacher with another vocabulary; None where it has the student's.
        private: [n] how private each token is, from 0 to 1, for losses that show less of such tokens; None means 0.

    Attributes:
        aligned: [n] whether the teacher has a row that predicts the same text; None where it has the student's
            vocabulary, as for the next two.
        span: [n] the number of the stretch of text that a token belongs to.
        span_log_probs: [n] the teacher's log-probability (nats) of that stretch.
    """

    def __init__(
        self,
        targets: Tensor,
        student_logits: Tensor,
        teacher: Tensor | TopKRows | SampledRows | None = None,
        *,
        tail: Tail = "bucket",
        hidden: Tensor | None = None,
        group: int | None = None,
        alignment: Alignment | None = None,
        private: Tensor | None = None,
    ) -> None:
        self.targets, self.hidden, self.group, self.tail, self.private = targets, hidden, group, tail, private
        self.aligned = self.span = self.span_log_probs = None
        if alignment is not None:
            self.aligned, self.span = alignment.aligned, alignment.span
            self.span_log_probs = alignment.span_log_probs
        self.measures: dict[str, Tensor] = {}
        self._student_logits = wide(student_logits)
        self._teacher = wide(teacher) if isinstance(teacher, Tensor) else teacher
        self._student: dict[float, Tensor] = {}
        self._pairs: dict[float, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_logits(cls, targets: Tensor, student_logits: Tensor, teacher_logits: Tensor | None = None) -> TokenChunk:
        """Make a chunk from logits of any origin; ids that are ruled out (minus infinity) get a probability of 0 that
        stays differentiable.

        Args:
            targets: [n] token ids.
            student_logits: [n, V].
            teacher_logits: [n, V] or None.
        """
        bounded = [
            None if logits is None else wide(logits).clamp(min=LOWEST) for logits in (student_logits, teacher_logits)
        ]
        return cls(targets, *bounded)

    def __len__(self) -> int:
        return self.targets.shape[0]

    @property
    def sparse(self) -> bool:
        """Whether each row has a support of its own (top-k ids), so that entries of two rows can't be compared."""
        return isinstance(self._teacher, TopKRows)

    @property
    def sampled(self) -> bool:
        """Whether the teacher's distribution is known through drawn ids only (see `samples`)."""
        return isinstance(self._teacher, SampledRows)

    @property
    def vocab_size(self) -> int:
        """The number V of ids."""
        return self._student_logits.shape[-1]

    @property
    def listed(self) -> int:
        """The number of ids that the teacher speaks of in each row: V, or K where it is sparse."""
        return self._given().ids.shape[-1] if self.sparse else self.vocab_size

    # --- distributions

    def student_log_probs(self, temperature: float = 1.0) -> Tensor:
        """The student's distribution over the whole vocabulary.

        Args:
            temperature: Divides the logits, > 0.

        Returns:
            [n, V] log-probabilities (nats).
        """
        if temperature not in self._student:
            self._student[temperature] = torch.log_softmax(_divided(self._student_logits, temperature), dim=-1)
        return self._student[temperature]

    def target_log_probs(self) -> Tensor:
        """[n] the student's log-probability (nats, temperature 1) of each target."""
        return self.student_log_probs().gather(-1, self.targets[:, None])[:, 0]

    def log_probs(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Both distributions on the shared support.

        Args:
            temperature: Divides both models' logits, > 0.

        Returns:
            Student and teacher, [n, S] each, S = V for a dense teacher and K + 1 for a sparse one (the last entry is
            the tail; S = K without a tail).

        Raises:
            ValueError: There is no teacher, or its sparse rows were taken at another temperature.
        """
        if temperature not in self._pairs:
            teacher = self._given()
            if isinstance(teacher, TopKRows):
                pair = self._listed(teacher, self._known(teacher, temperature), temperature)
            else:
                pair = self.student_log_probs(temperature), torch.log_softmax(_divided(teacher, temperature), dim=-1)
            self._pairs[temperature] = pair
        return self._pairs[temperature]

    def samples(self, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """What is known of a teacher through drawn ids.

        Args:
            temperature: Divides both models' logits, > 0.

        Returns:
            The log-probabilities of student and teacher at the drawn ids, and their weights, [n, K] each: the mean of
            `sum_k weights[k] f(ids[k])` over draws is the teacher's mean of f.

        Raises:
            ValueError: The rows aren't drawn, or were at another temperature.
        """
        if not isinstance(self._teacher, SampledRows):
            raise ValueError("The teacher's rows aren't drawn ids; read `log_probs`.")
        known = self._known(self._teacher, temperature)
        return self.student_log_probs(temperature).gather(-1, self._teacher.ids), known, self._teacher.weights

    def teacher_log_probs(self, temperature: float = 1.0) -> Tensor:
        """[n, V'] the teacher's distribution over all ids of its own vocabulary, which may not be the student's; rows
        that aren't `aligned` mean nothing.

        Raises:
            ValueError: There is no teacher, or it speaks of some ids only.
        """
        if not isinstance(self._teacher, Tensor):
            raise ValueError(
                "This loss reads the teacher's whole distribution, and its rows have some ids only, or there is none. "
                "Use a teacher that is a model, or a cache with the codec hidden."
            )
        return torch.log_softmax(_divided(self._teacher, temperature), dim=-1)

    def top_log_probs(self, count: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Both distributions on the teacher's likeliest ids, the likeliest first, and the rest as one tail entry.

        Args:
            count: How many ids; no more than the teacher lists are taken.
            temperature: Divides both models' logits, > 0.

        Returns:
            Student and teacher, [n, count + 1] each; without a tail where these ids are all there are, or where `tail`
            leaves it out.
        """
        places = self.top(count)
        if self.sparse:
            student, teacher = self.log_probs(temperature)
        else:
            student, teacher = (_divided(logits, temperature) for logits in (self._student_logits, self._given()))
        return _cut_to(student, places), _cut_to(teacher, places)

    def shared_log_probs(self, count: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Both distributions with all rows on the same ids: each id that is among the likeliest of any row, on
        either side. What lies elsewhere is left out, so that rows sum to less than 1.

        Args:
            count: Likeliest ids of each row.
            temperature: Divides both models' logits, > 0.

        Returns:
            Student and teacher, [n, U] each, ids ascending. An id that a row of a sparse teacher doesn't list counts
            as impossible there.
        """
        teacher = self._given()
        ours = self._student_logits.detach().topk(min(count, self.vocab_size), dim=-1).indices
        ids = torch.cat([ours.flatten(), self.top_ids(count).flatten()]).unique()
        student = _on_shared(_divided(self._student_logits, temperature), ids)
        if not isinstance(teacher, TopKRows):
            return student, _on_shared(_divided(teacher, temperature), ids)
        places = torch.searchsorted(ids, teacher.ids).clamp(max=len(ids) - 1)
        here = ids[places] == teacher.ids
        spread = student.new_full((len(self), len(ids) + 1), LOWEST)
        spread.scatter_(-1, torch.where(here, places, len(ids)), self._known(teacher, temperature).to(student.dtype))
        return student, spread[:, :-1]

    # --- logits and places

    def logits(self) -> tuple[Tensor, Tensor]:
        """The logits of both models, up to a constant in each row.

        Returns:
            Student and teacher: [n, V] each for a dense teacher; of a sparse one [n, K], its ids only, its own
            temperature taken out.
        """
        teacher = self._given()
        if isinstance(teacher, TopKRows):
            known = wide(teacher.log_probs).clamp(min=LOWEST) * teacher.temperature
            return self._student_logits.gather(-1, teacher.ids), known
        return self._student_logits, teacher

    def top(self, count: int) -> Tensor:
        """[n, min(count, S)] the columns of `logits` that the teacher finds likeliest, the likeliest first."""
        teacher = self._given()
        values = teacher.log_probs if isinstance(teacher, TopKRows) else teacher
        return values.topk(min(count, values.shape[-1]), dim=-1).indices

    def top_ids(self, count: int) -> Tensor:
        """[n, min(count, S)] the ids that the teacher finds likeliest, the likeliest first."""
        places = self.top(count)
        return self._teacher.ids.gather(-1, places) if isinstance(self._teacher, TopKRows) else places

    def target_places(self) -> Tensor:
        """[n] the column of each target in the support of `log_probs`; that of the tail where it isn't listed.

        Raises:
            ValueError: A target isn't listed and there is no tail.
        """
        return self._places(self._teacher.ids) if self.sparse else self.targets

    def top_places(self, count: int) -> Tensor:
        """[n] the column of each target in the support of `top_log_probs(count)`."""
        return self._places(self.top_ids(count))

    def agreement(self) -> Tensor | None:
        """The number of rows whose likeliest token is the teacher's likeliest, as a scalar; None where the teacher's
        isn't known.
        """
        if self._teacher is None or self.sampled or self.aligned is not None:
            return None
        return (self._student_logits.argmax(dim=-1) == self.top_ids(1)[:, 0]).sum()

    def measure(self, name: str, values: Tensor) -> None:
        """Note a figure for the log.

        Args:
            name: It becomes `loss/<term>/<name>`.
            values: [n], one for each token; the log shows their mean.
        """
        self.measures[name] = values.detach()

    # --- inside

    def _given(self) -> Tensor | TopKRows:
        """The teacher's word, where it speaks of the student's ids and says more than drawn ones do."""
        if self._teacher is None:
            raise ValueError(
                "This loss compares with a teacher, but the teacher gave no distribution. Give one, or use "
                "cross_entropy."
            )
        if self.sampled:
            raise ValueError(
                "The teacher's rows are drawn ids, which are right on average only for a loss that is linear in the "
                "teacher's distribution, and this one isn't. Use forward_kl, or a cache with the codec topk or hidden."
            )
        if self.aligned is not None:
            raise ValueError(
                "The teacher has another vocabulary, and this loss compares probabilities id by id. Use uld or "
                "span_likelihood, or a teacher of the student's family."
            )
        return self._teacher

    def _known(self, teacher: TopKRows | SampledRows, temperature: float) -> Tensor:
        """[n, K] what a sparse teacher says of its ids."""
        if temperature != teacher.temperature:
            raise ValueError(
                f"The loss has temperature {temperature}, but the teacher's rows were taken at temperature "
                f"{teacher.temperature}: "
                "they can't be converted, because what is left of the mass is unknown. Use the same temperature for "
                "both."
            )
        return wide(teacher.log_probs).clamp(min=LOWEST)

    def _listed(self, teacher: TopKRows, known: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The student on the ids of a sparse teacher, and what that says of them, each with its tail."""
        logits, ids = _divided(self._student_logits, temperature), teacher.ids
        if ids.shape[-1] == logits.shape[-1]:
            return _cut_to(logits, ids), known  # nothing is left for a tail: rounding must not be taken for mass
        if self.tail == "renormalize":
            return torch.log_softmax(logits.gather(-1, ids), dim=-1), torch.log_softmax(known, dim=-1)
        rest = _rest(known) if teacher.tail is None else wide(teacher.tail).clamp(min=LOWEST)
        return _cut_to(logits, ids), torch.cat([known, rest[:, None]], dim=-1)

    def _places(self, ids: Tensor) -> Tensor:
        found = ids == self.targets[:, None]
        if self.sparse and self.tail == "renormalize":
            listed = self._teacher.ids == self.targets[:, None]
            if not bool(listed.any(dim=-1).all()):
                raise ValueError(
                    "This loss asks where the text's own token is, but the teacher's top-k ids don't hold it, and "
                    "without a tail it is nowhere. Take tail 'bucket', or rows with more ids."
                )
        return torch.where(found.any(dim=-1), found.to(torch.uint8).argmax(dim=-1), ids.shape[-1])


def _divided(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def _rest(known: Tensor) -> Tensor:
    """[n] the log-probability that [n, K] known ones leave. One minus a sum that is nearly one: below float32's
    resolution the rest isn't known to be zero.
    """
    return torch.log1p(-known.logsumexp(dim=-1).exp().clamp(max=1.0)).clamp(min=SMALLEST_TAIL)


def _cut_to(logits: Tensor, ids: Tensor) -> Tensor:
    """[n, K + 1] log-probabilities of some columns [n, K] of each row, and of all others together; [n, K] if they are
    all there are.
    """
    chosen = logits.gather(-1, ids)
    if ids.shape[-1] == logits.shape[-1]:
        return torch.log_softmax(chosen, dim=-1)
    others = logits.scatter(-1, ids, LOWEST).logsumexp(dim=-1, keepdim=True)
    return torch.log_softmax(torch.cat([chosen, others], dim=-1), dim=-1)


def _on_shared(logits: Tensor, ids: Tensor) -> Tensor:
    """[n, U] log-probabilities of the same ids [U], each once, in every row."""
    return _OnShared.apply(logits, ids)


class _OnShared(torch.autograd.Function):
    """Logits of some columns minus the whole row's logsumexp. Rows are worked through a few at a time, because a CPU's
    cache holds a few, and the gradient is written where it belongs instead of being put together from parts.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor) -> Tensor:
        whole = torch.cat([some.logsumexp(dim=-1, keepdim=True) for some in logits.split(_FEW_ROWS)])
        ctx.save_for_backward(logits, ids, whole)
        return logits.index_select(-1, ids).sub_(whole)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        logits, ids, whole = ctx.saved_tensors
        found, total = torch.empty_like(logits), gradient.sum(dim=-1, keepdim=True).neg_()
        pieces = (one.split(_FEW_ROWS) for one in (found, logits, whole, total))
        for piece, some, normaliser, factor in zip(*pieces, strict=True):
            torch.sub(some, normaliser, out=piece).exp_().mul_(factor)
        return found.index_add_(-1, ids, gradient), None
