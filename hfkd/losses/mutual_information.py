"""How much a student's hidden states tell about the teacher's: can the right partner be told from the others?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hfkd.losses.state import Layers, StateLoss, StateRows, unit


class MutualInformation(StateLoss):
    """Punishes hidden states from which one can't tell which of the teacher's states belongs to the same token.

    Formula:
        -(1 + mean_i [f_ii - log(w m_i + (1 - w) a)] - mean_i [o_i / (w o_i + (1 - w) a)]), w = interpolation, a lower
        bound of the mutual information with its sign turned. f_ji = <W s_j, t_i> / (|W s_j| |t_i| temperature) for the
        student's state s of row j and the teacher's state t of row i; m_i is the mean of exp(f_ji) over all rows j of
        a group, o_i the mean over the other rows; a is a learned number that begins at 1; W is a learned matrix where
        the widths differ. Row i is charged its own part of the two means. Mean over the pairs of layers.
    Args:
        interpolation: Between 0 and 1. At 1 it is the InfoNCE loss minus the log of the group's size, never below
            minus that log and steady; towards 0 it can tell of more information, and its gradient is noisier.
        temperature: Divides the cosines, > 0.
        group_size: The most rows that are told apart from each other at once, >= 2; more rows are cut into groups of
            nearly the same size.
        layers: `uniform`, `last`, or [student layer, teacher layer] pairs.
        project: Whether to use W; None means where the widths differ.
    Reads:
        Hidden states of both models at the mapped layers; the other rows are those of the same micro-batch on this
        process, most of them from the same text, so its value depends on how batches are cut.
    Cost:
        O(group_size D) per token and pair, O(D**2) more with W. In nats, and negative wherever states say something.
    Undefined:
        Not 0 at equality: minus the information found, and so below 0. A row without others costs 0.
    Paper:
        He et al. (Distiller, its MI-alpha), 2021, https://arxiv.org/abs/2109.11105, on the bound of Poole et al.,
        2019, https://arxiv.org/abs/1905.06922. Cosines for f, one number for a, and tokens for samples are ours.
    Example:
        >>> import torch
        >>> student, teacher = torch.eye(4), 5 * torch.eye(4)
        >>> round(MutualInformation(interpolation=1.0).between(student, teacher).mean().item(), 4)
        -1.3862
    """

    def __init__(
        self,
        interpolation: float = 0.9,
        temperature: float = 0.1,
        group_size: int = 256,
        layers: Layers = "uniform",
        project: bool | None = None,
    ) -> None:
        super().__init__(layers, project)
        if not 0 <= interpolation <= 1 or not temperature > 0 or group_size < 2:
            raise ValueError(
                f"{self.key}: got interpolation {interpolation}, temperature {temperature}, group_size {group_size}; "
                "expected interpolation from 0 to 1, a temperature above 0 and groups of at least 2 rows."
            )
        self.interpolation, self.temperature, self.group_size = (
            float(interpolation),
            float(temperature),
            int(group_size),
        )
        # At interpolation = 1 nothing reads it.
        self.log_baseline = nn.Parameter(torch.zeros(()), requires_grad=self.interpolation < 1)

    def compare(self, student: Tensor, teacher: Tensor, states: StateRows) -> Tensor:
        """Return [N], each row's part of its group's bound."""
        count = max(1, math.ceil(len(student) / self.group_size))
        groups = zip(student.tensor_split(count), teacher.tensor_split(count), strict=True)
        return torch.cat([self.between(ours, theirs) for ours, theirs in groups])

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], each row's part of the bound, its sign turned; the n rows are one group."""
        rows = len(student)
        if rows < 2:
            return student.sum(dim=-1) * 0.0
        scores = unit(teacher) @ unit(student).T / self.temperature  # a teacher's state a row, a student's a column
        right = scores.diagonal()
        itself = torch.eye(rows, dtype=torch.bool, device=scores.device)
        mean_of_all = scores.logsumexp(dim=-1) - math.log(rows)
        mean_of_others = scores.masked_fill(itself, -torch.inf).logsumexp(dim=-1) - math.log(rows - 1)
        joint = right - self._log_mixture(mean_of_all)
        marginal = (mean_of_others - self._log_mixture(mean_of_others)).exp()
        return marginal - joint - 1.0

    def settings(self) -> dict[str, Any]:
        """Everything that defines the bound."""
        names = ("interpolation", "temperature", "group_size")
        return {**{name: getattr(self, name) for name in names}, **super().settings()}

    def _log_mixture(self, log_mean: Tensor) -> Tensor:
        """Log of interpolation times the mean plus 1 - interpolation times the learned number."""
        baseline = self.log_baseline.to(log_mean.dtype)
        if self.interpolation == 1:
            return log_mean
        if self.interpolation == 0:
            return baseline.expand_as(log_mean)
        return torch.logaddexp(math.log(self.interpolation) + log_mean, math.log1p(-self.interpolation) + baseline)
