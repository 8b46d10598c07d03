"""Targets that leave a little to tokens which the student's own output head takes to be like the text's token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hfkd.losses.base import TokenLoss
from hfkd.support import TokenChunk

_IDS_AT_ONCE = 16384


class EmbeddingNeighbours(TokenLoss):
    """Punishes a student that misses the text's token, less so where it says one that its head holds to be alike.

    Formula:
        KL(m || q), m over the text's token y and its k nearest neighbours v, m_v proportional to exp(-d(y, v) /
        spread), d the distance of their rows of the head, centred and scaled to length 1, so that it is between 0 and
        2. The neighbours have `cap` of the mass at most.
    Args:
        neighbours: How many, k >= 1.
        spread: How far mass reaches, > 0, in the unit of the distance; near 0 this is cross-entropy.
        cap: The most that all neighbours together may have, from 0 to below 1.
    Reads:
        The student, the target ids, and the student's head as it was before the first step.
    Cost:
        O(V) per token: a cross-entropy, and one look at the whole head for each token of the vocabulary that comes up
        for the first time. A head that is trained is kept once more.
    Undefined:
        Nowhere. As with cross-entropy there is no teacher, so it is not 0 at equality with one; it is 0 where q = m.
        Until it is shown a head (`Objective.prepare` does) it knows no neighbours and is cross-entropy.
    Paper:
        After Hahn and Choi, 2019, https://arxiv.org/abs/1908.01851, who give mass to the text's token and to the one
        that the model predicts, by the distance of the two; the nearest neighbours in place of the predicted token,
        centring, scaling and `cap` are ours.
    Example:
        >>> import torch
        >>> from hfkd.support import TokenChunk
        >>> loss = EmbeddingNeighbours(neighbours=1, spread=1.0, cap=0.5)
        >>> loss.read_head(torch.tensor([[3.0, 1.0], [3.0, 0.9], [-3.0, 0.0], [-3.0, -1.9]]))
        >>> chunk = TokenChunk.from_logits(torch.tensor([0]), torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log())
        >>> round(loss(chunk).item(), 4), round(chunk.measures["neighbours"].item(), 4)
        (0.3649, 0.4924)
    """

    fits_text = True

    def __init__(self, neighbours: int = 16, spread: float = 0.2, cap: float = 0.2) -> None:
        super().__init__()
        if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1:
            raise ValueError(f"{self.key}: neighbours is {neighbours!r}; expected a whole number of at least 1.")
        if not 0 < spread < float("inf"):
            raise ValueError(f"{self.key}: spread is {spread}; expected a distance above 0, such as 0.2.")
        if not 0 <= cap < 1:
            raise ValueError(
                f"{self.key}: cap is {cap}; expected a share of the mass from 0 (the text alone) to below 1, because "
                "the text's token must keep some."
            )
        self.neighbours, self.spread, self.cap = neighbours, float(spread), float(cap)
        self._head: Tensor | None = None
        self._known: _Known | None = None

    def prepare(self, width: int, vocab_size: int) -> None:
        """Forget the head; the student's own is shown next."""
        self._head = self._known = None

    def read_head(self, weight: Tensor) -> None:
        """Keep the head: itself where it is frozen, else a copy, so that the targets stay what they are.

        Raises:
            ValueError: It scores too few ids.
        """
        if self.neighbours >= weight.shape[0]:
            raise ValueError(
                f"{self.key}: neighbours is {self.neighbours}, but the student scores {weight.shape[0]} ids; expected "
                "fewer."
            )
        self._head = weight.detach().clone() if weight.requires_grad else weight.detach()
        self._known = None

    def forward(self, chunk: TokenChunk) -> Tensor:
        """Return [n], KL(target || student)."""
        student = chunk.student_log_probs()
        if self._head is None:
            return -chunk.target_log_probs()
        with torch.no_grad():
            ids, mass = self.target(chunk.targets, chunk.vocab_size)
            entropy = torch.special.entr(mass).sum(dim=-1)
        chunk.measure("neighbours", 1 - mass[:, 0])
        return -(mass * student.gather(-1, ids)).sum(dim=-1) - entropy

    def target(self, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """The distribution that takes the place of each token of the text.

        Args:
            targets: [n] ids.
            vocab_size: Ids from here on have no part in it.

        Returns:
            Ids and their probabilities, [n, k + 1] each; the text's token comes first.
        """
        if self._head.device != targets.device:  # the model was placed after it had shown its head
            self._head, self._known = self._head.to(targets.device), None
        if self._known is None or self._known.vocab_size != vocab_size:
            self._known = _Known(self._head[:vocab_size], min(self.neighbours, vocab_size - 1))
        near, distances = self._known.neighbours_of(targets)
        mass = torch.softmax(torch.cat([torch.zeros_like(distances[:, :1]), -distances / self.spread], dim=-1), dim=-1)
        theirs = mass[:, 1:].sum(dim=-1, keepdim=True)
        kept = mass[:, 1:] * (self.cap / theirs.clamp(min=1e-30)).clamp(max=1.0)
        mass = torch.cat([1 - kept.sum(dim=-1, keepdim=True), kept], dim=-1)
        return torch.cat([targets[:, None], near], dim=-1), mass

    def settings(self) -> dict[str, Any]:
        """How many neighbours, how far, how much."""
        return {"neighbours": self.neighbours, "spread": self.spread, "cap": self.cap}


class _Known:
    """The neighbours of the ids that have come up so far.

    Args:
        head: [V, H].
        count: k, below V.
    """

    def __init__(self, head: Tensor, count: int) -> None:
        self.head, self.vocab_size, device = head, head.shape[0], head.device
        self.mean = sum(rows.sum(dim=0) for rows in self._blocks()) / self.vocab_size
        lengths = [(rows - self.mean).norm(dim=-1) for rows in self._blocks()]
        self.lengths = torch.cat(lengths).clamp(min=torch.finfo(self.mean.dtype).tiny)
        self.seen = torch.zeros(self.vocab_size, dtype=torch.bool, device=device)
        self.ids = torch.zeros(self.vocab_size, count, dtype=torch.int32, device=device)
        self.distances = torch.zeros(self.vocab_size, count, device=device)

    def neighbours_of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and distances, [n, k] each, the nearest first."""
        fresh = targets[~self.seen[targets]].unique()
        if fresh.numel():
            self._find(fresh)
        return self.ids[targets].long(), self.distances[targets]

    def _find(self, fresh: Tensor) -> None:
        ours = (self.head[fresh].to(self.mean.dtype) - self.mean) / self.lengths[fresh, None]
        alike = torch.cat([ours @ (rows - self.mean).T for rows in self._blocks()], dim=-1) / self.lengths
        alike.scatter_(-1, fresh[:, None], float("-inf"))
        values, ids = alike.topk(self.ids.shape[-1], dim=-1)
        self.ids[fresh] = ids.to(self.ids.dtype)
        self.distances[fresh] = (2 - 2 * values).clamp(min=0).sqrt().float()
        self.seen[fresh] = True

    def _blocks(self) -> Iterator[Tensor]:
        """Some rows of the head at a time, in float32 or wider."""
        wide = torch.promote_types(self.head.dtype, torch.float32)
        for start in range(0, self.vocab_size, _IDS_AT_ONCE):
            yield self.head[start : start + _IDS_AT_ONCE].to(wide)
