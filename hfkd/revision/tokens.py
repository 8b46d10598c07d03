"""A step's batch with fewer supervised tokens, or with other weights: what revisers do to one, in both views alike.

Knows nothing of why a token is left out or counts less.

Shapes: N supervised tokens in the order of `Batch.student.targets`, B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hfkd.batch import IGNORE, predicted


def with_only(inputs: Mapping[str, Any], kept: ArrayLike) -> dict[str, Any]:
    """Leave tokens of a batch unsupervised.

    Args:
        inputs: What `Batch.to_inputs` returns.
        kept: [N] booleans, False where nothing is to be learned any more.

    Returns:
        A new batch; where all are kept, one with the same tensors.
    """
    chosen = torch.as_tensor(kept, dtype=torch.bool)
    if bool(chosen.all()):
        return dict(inputs)
    names = [name for name in ("labels", "teacher_labels") if name in inputs]
    return {**inputs, **{name: _without(inputs[name], ~chosen.to(inputs[name].device)) for name in names}}


def weighed(inputs: Mapping[str, Any], factors: ArrayLike) -> dict[str, Any]:
    """Multiply the weights of a batch's tokens; tokens without one have the weight 1.

    Args:
        inputs: What `Batch.to_inputs` returns.
        factors: [N] none below 0.

    Returns:
        A new batch with `token_weights` [B, T].
    """
    labels, known = inputs["labels"], inputs.get("token_weights")
    new = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    new[:, 1:][predicted(labels)] = torch.as_tensor(factors, dtype=torch.float32).to(labels.device)
    return {**inputs, "token_weights": new if known is None else new * known}


def _without(labels: Tensor, dropped: Tensor) -> Tensor:
    """[B, T] the labels with some of the N supervised ones taken out."""
    new = labels.clone()
    new[:, 1:][predicted(labels)] = torch.where(dropped, IGNORE, labels[:, 1:][predicted(labels)])
    return new
