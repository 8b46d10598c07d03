"""Distances between a student's and a teacher's hidden state of the same token, one token at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hfkd.losses.state import Layers, StateLoss, StateRows, unit


class HiddenMSE(StateLoss):
    """Punishes squared distance between the student's hidden states and the teacher's, dimension by dimension.

    Formula:
        mean_d (W s - t)_d ** 2, s the student's state, t the teacher's, W a learned matrix where the widths differ
        (the identity otherwise); with `normalize` on vectors that are first brought to mean 0 and variance 1. Mean
        over the pairs of layers.
    Args:
        normalize: Compare directions and not sizes: a few dimensions of a language model's states are a hundred times
            larger than the rest and take all of the plain distance.
        layers: `uniform`, `last`, or [student layer, teacher layer] pairs.
        project: Whether to use W; None means where the widths differ.
    Reads:
        Hidden states of both models at the mapped layers.
    Cost:
        O(D) per token and pair, O(D**2) with W. Not in nats: the square of the states' unit.
    Undefined:
        Nowhere.
    Paper:
        Romero et al. (FitNets), 2014, https://arxiv.org/abs/1412.6550; for transformers Jiao et al. (TinyBERT), 2019,
        https://arxiv.org/abs/1909.10351. `normalize` is ours.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])
        >>> round(HiddenMSE().between(student, teacher).item(), 4)
        2.0
    """

    def __init__(self, normalize: bool = False, layers: Layers = "uniform", project: bool | None = None) -> None:
        super().__init__(layers, project)
        self.normalize = normalize

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], the mean squared difference."""
        if self.normalize:
            student, teacher = (nn.functional.layer_norm(side, side.shape[-1:]) for side in (student, teacher))
        return (student - teacher).square().mean(dim=-1)

    def settings(self) -> dict[str, Any]:
        """Whether sizes count, and what every state loss has."""
        return {"normalize": self.normalize, **super().settings()}


class HiddenCosine(StateLoss):
    """Punishes the angle between the student's hidden states and the teacher's; their lengths don't count.

    Formula:
        1 - <W s, t> / (|W s| |t|), s the student's state, t the teacher's, W a learned matrix where the widths differ
        (the identity otherwise). Mean over the pairs of layers.
    Args:
        layers: `uniform`, `last`, or [student layer, teacher layer] pairs.
        project: Whether to use W; None means where the widths differ.
    Reads:
        Hidden states of both models at the mapped layers.
    Cost:
        O(D) per token and pair, O(D**2) with W. Not in nats: between 0 and 2.
    Undefined:
        At a vector of length 0, which has no direction: it costs 1 and gets no gradient.
    Paper:
        Sanh et al. (DistilBERT), 2019, https://arxiv.org/abs/1910.01108, on the last layer.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> round(HiddenCosine().between(student, teacher).item(), 4)
        0.2929
    """

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return [n], one minus the cosine."""
        return (1.0 - (unit(student) * unit(teacher)).sum(dim=-1)).clamp(min=0.0)


class NormDirection(StateLoss):
    """Punishes a last hidden state that points away from the teacher's output vector of the true token, or that is
    shorter than the teacher's state.

    Formula:
        1 - <s, c / |c|> / max(|s|, |t|), s the student's state, t the teacher's, c the row of the teacher's output
        head for the true next token.
    Args:
        layers: `last`, because only there do the head's rows and the states share a space; pairs of other layers are
            taken as given.
        project: Whether a learned matrix is put before s; None means where the widths differ.
    Reads:
        Hidden states of both models, the true next token, the teacher's output head.
    Cost:
        O(D) per token. Not in nats: between 0 and 2.
    Undefined:
        Where s and t, or c, have length 0: it costs 1 and gets no gradient. Not 0 at equality: it is 0 where s lies in
        c's direction and is at least as long as t, and growing longer costs nothing. A norm before the student's own
        head may cancel the length.
    Paper:
        Wang et al. (norm and direction, with class means for c), 2023, https://arxiv.org/abs/2305.17007. The head's
        rows in place of class means are ours.
    Example:
        >>> import torch
        >>> from hfkd.losses.state import StateRows
        >>> from hfkd.rows import Head, RowLayout
        >>> student, teacher = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])
        >>> targets, layout = torch.tensor([1]), RowLayout.single(1, torch.device("cpu"))
        >>> head = Head(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        >>> states = StateRows({2: student}, {2: teacher}, layout, targets, head)
        >>> loss = NormDirection()
        >>> loss.prepare(student_layers=2, teacher_layers=2, student_width=2, teacher_width=2)
        >>> round(loss(states).item(), 4)
        0.4
    """

    def __init__(self, layers: Layers = "last", project: bool | None = None) -> None:
        super().__init__(layers, project)

    def compare(self, student: Tensor, teacher: Tensor, states: StateRows) -> Tensor:
        """Return [N], what is missing in length along the target's direction.

        Raises:
            ValueError: There is no teacher's head to read directions from, or it has another width than the states.
        """
        head = states.teacher_head
        if head is None or head.weight.shape[1] != teacher.shape[1]:
            got = (
                "none" if head is None else f"one of width {head.weight.shape[1]} beside states of {teacher.shape[1]}"
            )
            raise ValueError(
                f"{self.key} reads directions off the teacher's output head and got {got}. Use a teacher that is a "
                "model in this process, at `layers: last`."
            )
        wanted = unit(head.weight.detach()[states.targets.to(head.weight.device)].to(student))
        length = torch.maximum(student.norm(dim=-1), teacher.norm(dim=-1))
        known = length > 0
        return 1.0 - (student * wanted).sum(dim=-1) / length.where(known, 1.0) * known
