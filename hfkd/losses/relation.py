"""How the tokens of an answer relate to each other in a student's hidden states and in a teacher's."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from hfkd.losses.state import Layers, StateLoss, StateRows, unit

_MEASURES = ("mse", "kl")


class Relation(StateLoss):
    """Punishes tokens of a sequence that are more alike, or less, to the student than they are to the teacher.

    Formula:
        For row i: mean_j (S_ij - T_ij) ** 2, or with `kl` the sum over j of P_ij log(P_ij / Q_ij), P = softmax(T /
        temperature) and Q = softmax(S / temperature) along j. S and T hold the cosines between the rows of a sequence
        in the student's and in the teacher's states. Mean over the pairs of layers.
    Args:
        measure: `mse`, the difference of cosines, or `kl`, of how each token's likeness is spread over the others.
        temperature: Divides the cosines of `kl`, > 0; the smaller, the more the nearest tokens count.
        window: The most supervised tokens that are compared with each other; longer answers are cut into runs, >= 1.
        layers: `uniform`, `last`, or [student layer, teacher layer] pairs.
        project: Widths may differ, so no projection is needed; true puts a learned matrix before the student's states
            all the same.
    Reads:
        Hidden states of both models at the mapped layers, and which rows belong to which sequence.
    Cost:
        O(window D) per token and pair. Not in nats with `mse` (between 0 and 4), in nats with `kl`.
    Undefined:
        Nowhere. It is also 0 where the two spaces are turned against each other, and for a row that stands alone. A
        vector of length 0 is like no other, nor itself.
    Paper:
        Wang et al. (MiniLM), 2020, https://arxiv.org/abs/2002.10957, for `kl`, there between the values of one layer;
        Zhang et al. (TRG), 2023, https://arxiv.org/abs/2306.12442, between patches of images. `mse` of cosines and the
        windows are ours.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
        >>> [round(value, 4) for value in Relation().between(student, teacher).tolist()]
        [0.25, 0.25]
    """

    compares_vectors = False

    def __init__(
        self,
        measure: Literal["mse", "kl"] = "mse",
        temperature: float = 0.1,
        window: int = 512,
        layers: Layers = "uniform",
        project: bool | None = None,
    ) -> None:
        super().__init__(layers, project)
        if measure not in _MEASURES:
            raise ValueError(f"{self.key}: measure is {measure!r}; expected one of {', '.join(_MEASURES)}.")
        if not temperature > 0 or window < 1:
            raise ValueError(
                f"{self.key}: got temperature {temperature} and window {window}; expected a temperature above 0 and a "
                "window of at least 1 row."
            )
        self.measure, self.temperature, self.window = measure, float(temperature), int(window)

    def compare(self, student: Tensor, teacher: Tensor, states: StateRows) -> Tensor:
        """Return [N], each row against the rows of its run."""
        if not len(student):
            return student.sum(dim=-1)
        layout = states.layout
        runs = torch.stack([layout.sequence, layout.position // self.window])
        sizes = torch.unique_consecutive(runs, dim=1, return_counts=True)[1].tolist()
        pairs = zip(student.split(sizes), teacher.split(sizes), strict=True)
        return torch.cat([self.between(ours, theirs) for ours, theirs in pairs])

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], the difference of the relations; the n rows are one run."""
        ours, theirs = (vectors @ vectors.T for vectors in (unit(student), unit(teacher)))
        if self.measure == "mse":
            return (ours - theirs).square().mean(dim=-1)
        likely, believed = (torch.log_softmax(cosines / self.temperature, dim=-1) for cosines in (theirs, ours))
        return (likely.exp() * (likely - believed)).sum(dim=-1)

    def settings(self) -> dict[str, Any]:
        """Everything that defines the relation."""
        names = ("measure", "temperature", "window")
        return {**{name: getattr(self, name) for name in names}, **super().settings()}
