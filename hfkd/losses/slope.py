"""A value whose derivative is known in closed form: autograd is handed the result in place of the steps to it.

Every step that autograd records costs two more passes over the vocabulary; for the common divergences that is most of
what they cost besides the matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_slope(student: Tensor, values: Tensor, slope: Tensor, scale: float = 1.0) -> Tensor:
    """Give values their derivative.

    Args:
        student: [n, S] what the values are differentiated by.
        values: [n], outside the graph.
        slope: [n, S] the derivative of each row's value by that row of `student`; kept, so not to be written to
            afterwards. A multiple of the student's probabilities may be left out: behind a softmax it adds nothing.
        scale: A factor of the slope that isn't multiplied in yet.

    Returns:
        [n] the values, inside the graph. They can be differentiated once.
    """
    return _Known.apply(student, values, slope, scale)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, values: Tensor, slope: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.scale = scale
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        (slope,) = ctx.saved_tensors
        return slope * (gradient * ctx.scale)[:, None], None, None, None


def mixture_of(first: Tensor, second: Tensor, share: float) -> Tensor:
    """share * first + (1 - share) * second of probabilities, outside the graph, made to have a logarithm.

    Where both have underflown it is the smallest number instead of 0: what its logarithm is multiplied with there is 0
    too.
    """
    mixture = torch.lerp(second, first, share)
    return mixture.clamp_(min=torch.finfo(mixture.dtype).tiny)
