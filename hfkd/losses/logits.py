"""Losses on logits instead of probabilities: their squares, and their form once position and size are taken out."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from hfkd.losses.base import Divergence, Temperature
from hfkd.losses.slope import with_slope
from hfkd.support import TokenChunk


class LogitDivergence(Divergence):
    """A measure between the student's and the teacher's logits.

    Logits are known up to a constant in each row, so log-probabilities are logits, too.
    """

    @abstractmethod
    def between_logits(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Measure each row.

        Args:
            student: [n, S] logits, with a gradient; not divided by the temperature.
            teacher: [n, S] logits of the same entries, without one.

        Returns:
            [n], before the scale by temperature ** 2.
        """

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], with log-probabilities for the logits."""
        return self.between_logits(student, teacher)

    def compare(self, chunk: TokenChunk) -> Tensor:
        """Return [n], the measure on the logits of the chunk."""
        return self.between_logits(*chunk.logits())


class LogitMSE(LogitDivergence):
    """Punishes logits that differ from the teacher's, the unlikely tokens' as much as the likely ones'.

    Formula:
        1/S sum_v d(v)^2, d = (s - t) / temperature minus its mean over the S entries; s the student's, t the teacher's
        logits.
    Args:
        centre: Take the mean out, because a constant on all logits changes no probability. Without it a teacher with
            whole distributions is needed.
        temperature: Divides both models' logits, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2: then the temperature changes nothing.
    Reads:
        The logits of the whole vocabulary, or of the ids that a sparse teacher lists, without its tail.
    Cost:
        O(V) per token, less than a KL.
    Undefined:
        Nowhere. Not nats but squared logits. An id that one model rules out and the other doesn't costs 1e8 / S.
    Paper:
        Ba and Caruana, 2014, https://arxiv.org/abs/1312.6184; beside the KL: Kim et al., 2021,
        https://arxiv.org/abs/2105.08919. Taking the mean out is ours.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 3.0, 1.0]])
        >>> round(LogitMSE().between_logits(student, teacher).item(), 4)
        2.0
    """

    def __init__(
        self, centre: bool = True, temperature: Temperature = 1.0, scale_by_temperature_squared: bool = True
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        self.centre = bool(centre)

    def compare(self, chunk: TokenChunk) -> Tensor:
        """Return [n], the mean square of each row.

        Raises:
            ValueError: The teacher's rows are sparse and the mean is to stay.
        """
        if chunk.sparse and not self.centre:
            raise ValueError(
                f"{self.key}: centre is False, but the teacher gave top-k rows, whose logits are known up to a "
                "constant only. Use centre: true, or a teacher with whole distributions."
            )
        return super().compare(chunk)

    def between_logits(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], the mean square of the differences."""
        with torch.no_grad():
            gap = student - teacher
            if self.centre:
                gap -= gap.mean(dim=-1, keepdim=True)
            factor = 1.0 / (gap.shape[-1] * self.temperature**2)
            values = gap.square().sum(dim=-1) * factor
            slope = gap.mul_(2.0 * factor)
        return with_slope(student, values, slope)

    def settings(self) -> dict[str, Any]:
        """Whether the mean is taken out, and what every divergence has."""
        return {"centre": self.centre, **super().settings()}


_SPREAD_OFFSET = 1e-7
"""What is added to the standard deviation before it divides."""


class StandardizedKL(LogitDivergence):
    """Punishes logits of another form than the teacher's, whatever their position and their size.

    Formula:
        KL(softmax(t') || softmax(s')), z' = (z - mean(z)) / (std(z) + 1e-7) / temperature for the student's logits s
        and the teacher's t; mean and population standard deviation over the entries of the row.
    Args:
        temperature: Divides both models' standardised logits, > 0. With a large vocabulary the likeliest token is
            many standard deviations away; a temperature below 1 makes the distributions more pointed.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        The logits of the whole vocabulary, or of the ids that a sparse teacher lists, without its tail.
    Cost:
        O(V) per token, about two to three times a KL.
    Undefined:
        Nowhere. Logits that are all equal stay equal, and then the gradient is as large as 1e7. It is 0 for the
        teacher's logits times any positive factor, plus any constant. Ids that are ruled out (a logit of -1e4) stretch
        the standard deviation.
    Paper:
        Sun et al., 2024, https://arxiv.org/abs/2403.01427.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 3.0, 1.0]])
        >>> round(StandardizedKL().between_logits(student, teacher).item(), 4)
        0.3183
    """

    def __init__(self, temperature: Temperature = 2.0, scale_by_temperature_squared: bool = True) -> None:
        super().__init__(temperature, scale_by_temperature_squared)

    def between_logits(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], the divergence of the standardised logits."""
        with torch.no_grad():
            theirs, _ = _standardised(teacher)
            ours, spread = _standardised(student)
            expected = theirs.div_(self.temperature).log_softmax(dim=-1)
            believed = (ours / self.temperature).log_softmax(dim=-1)
            likely = expected.exp()
            values = expected.sub_(believed).mul_(likely).sum(dim=-1)
            # By the standardised logits first, then through the standard deviation; the mean adds nothing, because
            # both distributions have the same sum.
            slope = believed.exp_().sub_(likely)
            along = (slope * ours).mean(dim=-1, keepdim=True)
            growth = 1.0 + _SPREAD_OFFSET / spread.clamp(min=_SPREAD_OFFSET**2)
            slope = slope.addcmul_(ours, along * growth, value=-1).div_((spread + _SPREAD_OFFSET) * self.temperature)
        return with_slope(student, values, slope)


def _standardised(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[n, S] logits without their mean and their size, and [n, 1] their standard deviation."""
    centred = logits - logits.mean(dim=-1, keepdim=True)
    spread = centred.square().mean(dim=-1, keepdim=True).sqrt_()
    return centred.div_(spread + _SPREAD_OFFSET), spread
