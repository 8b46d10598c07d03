"""What a loss reads: a few supervised tokens, student and teacher side by side on one support.

The support is the whole vocabulary where the teacher's rows are dense, or the teacher's top-k ids plus one tail bucket
where they are sparse. A `TokenChunk` holds logits of a handful of rows, made by the objective's chunk runner, and
hands out log-probabilities in float32. It doesn't know where they come from or what becomes of the loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hfkd.rows import LOWEST, TopKRows

SMALLEST_TAIL = math.log(2.0**-24)
"""The log-probability that a sparse teacher's tail has at least, because its float32 log-probabilities can't tell."""


def wide(values: Tensor) -> Tensor:
    """Raise half precision to float32; float32 and float64 stay what they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


class TokenChunk:
    """Some supervised tokens, as logits of the student and what the teacher says of them.

    Args:
        targets: [n] the ids that the tokens really have.
        student_logits: [n, V] the student's logits.
        teacher: [n, V] the teacher's logits, its `TopKRows` of n rows, or None for losses that need no teacher.
    """

    def __init__(self, targets: Tensor, student_logits: Tensor, teacher: Tensor | TopKRows | None = None) -> None:
        self.targets = targets
        self._student_logits = wide(student_logits)
        self._teacher = teacher if isinstance(teacher, TopKRows) or teacher is None else wide(teacher)
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

    def student_log_probs(self, temperature: float = 1.0) -> Tensor:
        """The student's distribution over the whole vocabulary.

        Args:
            temperature: Divides the logits, > 0.

        Returns:
            [n, V] log-probabilities (nats).
        """
        if temperature not in self._student:
            self._student[temperature] = _log_softmax(self._student_logits, temperature)
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
            the tail).

        Raises:
            ValueError: There is no teacher, or its sparse rows were taken at another temperature.
        """
        if self._teacher is None:
            raise ValueError(
                "This loss compares with a teacher, but the teacher gave no distribution. Give one, or use "
                "cross_entropy."
            )
        if temperature not in self._pairs:
            if isinstance(self._teacher, TopKRows):
                self._pairs[temperature] = self._sparse(self._teacher, temperature)
            else:
                self._pairs[temperature] = (
                    self.student_log_probs(temperature),
                    _log_softmax(self._teacher, temperature),
                )
        return self._pairs[temperature]

    @property
    def sparse(self) -> bool:
        """Whether each row has a support of its own (top-k ids), so that entries of two rows can't be compared."""
        return isinstance(self._teacher, TopKRows)

    def agreement(self) -> Tensor | None:
        """The number of rows whose likeliest token is the teacher's likeliest, as a scalar; None without a teacher."""
        if self._teacher is None:
            return None
        best = self._student_logits.argmax(dim=-1)
        if isinstance(self._teacher, TopKRows):
            theirs = self._teacher.ids.gather(-1, self._teacher.log_probs.argmax(dim=-1, keepdim=True))[:, 0]
        else:
            theirs = self._teacher.argmax(dim=-1)
        return (best == theirs).sum()

    def _sparse(self, teacher: TopKRows, temperature: float) -> tuple[Tensor, Tensor]:
        if temperature != teacher.temperature:
            raise ValueError(
                f"The loss has temperature {temperature}, but the teacher's top-k rows were taken at temperature "
                f"{teacher.temperature}: "
                "they can't be converted, because what is left of the mass is unknown. Use the same temperature for "
                "both."
            )
        logits = self._student_logits if temperature == 1.0 else self._student_logits / temperature
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        head = logits.gather(-1, teacher.ids) - normaliser
        known = wide(teacher.log_probs).clamp(min=LOWEST)
        if teacher.ids.shape[-1] == teacher.vocab_size:
            return head, known  # nothing is left for a tail, and rounding must not be taken for mass
        tail = logits.scatter(-1, teacher.ids, LOWEST).logsumexp(dim=-1, keepdim=True) - normaliser
        # One minus a sum that is nearly one: below float32's resolution the tail's mass isn't known to be zero.
        rest = torch.log1p(-known.logsumexp(dim=-1, keepdim=True).exp().clamp(max=1.0)).clamp(min=SMALLEST_TAIL)
        return torch.cat([head, tail], dim=-1), torch.cat([known, rest], dim=-1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
