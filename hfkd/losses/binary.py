"""Each logit for itself, on a head that is the student's plus a small one of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hfkd.losses.base import Temperature
from hfkd.losses.logits import LogitDivergence
from hfkd.support import TokenChunk


class LogitBinaryKL(LogitDivergence):
    """Punishes every one of the teacher's likeliest tokens whose logit differs from the teacher's, each by itself, on
    an auxiliary head.

    Formula:
        sum_k [(log(1 + exp(x_k)) + log(1 + exp(-x_k))) / 2 - log 2], x = (s' - t) / temperature over the teacher's
        `support` likeliest ids, s' and t each minus its mean over them: the KL of a fair coin to one that falls with
        probability 1 / (1 + exp(-x_k)). t is the teacher's logit, s' the student's plus up_k . (down h), h the
        student's last hidden state; down (random) and up (0 at first) are learned.
    Args:
        rank: Width of the auxiliary head, >= 1.
        support: Ids of each token that are compared, >= 2.
        temperature: Divides the difference, > 0.
        scale_by_temperature_squared: Multiply by temperature ** 2.
    Reads:
        Both models' logits and the student's hidden states. The student's output head gets no gradient, only what is
        below it and the auxiliary head, which isn't part of the model that is saved. Without hidden states, and before
        `prepare`, the auxiliary head is left out.
    Cost:
        O(V) per token to find the likeliest ids, then O(rank support); and `rank` (H + V) more weights.
    Undefined:
        Nowhere. Not nats of a token but a sum over `support` coins.
    Paper:
        Yang et al. (DHKD), 2024, https://arxiv.org/abs/2411.08937. The low rank, the support and taking the mean out
        are ours; their auxiliary head is a whole one.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 3.0, 1.0]])
        >>> round(LogitBinaryKL().between_logits(student, teacher).item(), 4)
        0.182
    """

    may_stand_alone = False
    why_not_alone = "the student's own output head learns nothing from it."
    auxiliary: ClassVar[bool] = True

    def __init__(
        self,
        rank: int = 8,
        support: int = 128,
        temperature: Temperature = 2.0,
        scale_by_temperature_squared: bool = True,
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        if not rank >= 1 or not support >= 2:
            raise ValueError(
                f"{self.key}: got rank {rank}, support {support}; expected a rank of at least 1 and at least 2 ids, "
                "because a single logit is known up to a constant only."
            )
        self.rank, self.support = int(rank), int(support)
        self.register_parameter("down", None)
        self.register_parameter("up", None)

    def prepare(self, width: int, vocab_size: int) -> None:
        """Make the auxiliary head.

        Args:
            width: H of the student's last hidden states.
            vocab_size: V of the student's output head.
        """
        if self.up is not None and (self.down.shape[1], self.up.shape[0]) == (width, vocab_size):
            return
        self.down = nn.Parameter(torch.randn(self.rank, width) * width**-0.5)
        self.up = nn.Parameter(torch.zeros(vocab_size, self.rank))

    def compare(self, chunk: TokenChunk) -> Tensor:
        """Return [n], the sum over the teacher's likeliest ids."""
        student, teacher = chunk.logits()
        places = chunk.top(self.support)
        chosen = student.gather(-1, places)
        if self.up is not None and chunk.hidden is not None:
            ids = chunk.top_ids(self.support) if chunk.sparse else places
            narrow = nn.functional.linear(chunk.hidden.to(self.down.dtype), self.down)
            added = torch.einsum("nkr,nr->nk", nn.functional.embedding(ids, self.up), narrow)
            chosen = chosen + added.to(chosen.dtype)
        return self.between_logits(chosen, teacher.gather(-1, places))

    def between_logits(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], the sum over the `support` entries that the teacher finds likeliest."""
        if student.shape[-1] > self.support:
            places = teacher.topk(self.support, dim=-1).indices
            student, teacher = student.gather(-1, places), teacher.gather(-1, places)
        gap = student - teacher
        size = ((gap - gap.mean(dim=-1, keepdim=True)) / self.temperature).abs()
        # |x| / 2 + log((1 + exp(-|x|)) / 2): exactly 0 at 0, and never too large to be computed.
        return (size / 2 + torch.log1p(torch.expm1(-size) / 2)).sum(dim=-1)

    def settings(self) -> dict[str, Any]:
        """The auxiliary head's width, the number of ids, and what every divergence has."""
        return {"rank": self.rank, "support": self.support, **super().settings()}
