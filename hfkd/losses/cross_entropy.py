"""Cross-entropy on the text itself: plain fine-tuning, and the hard form of distillation when the teacher wrote the
text.
"""

from __future__ import annotations

from torch import Tensor

from hfkd.losses.base import TokenLoss
from hfkd.support import TokenChunk


class CrossEntropy(TokenLoss):
    """Punishes a student that finds the token of the text unlikely.

    Formula:
        -log q(target), q the student at temperature 1.
    Args:
        None.
    Reads:
        The student's distribution and the target ids. No teacher.
    Cost:
        O(V) per token.
    Undefined:
        Nowhere; a target that is ruled out (logit of minus infinity) costs about 1e4 nats. It is 0 only where
        q(target) = 1.
    Paper:
        None. On text that the teacher wrote it is sequence-level distillation (Kim and Rush, 2016,
        https://arxiv.org/abs/1606.07947).
    Example:
        >>> import torch
        >>> from hfkd.support import TokenChunk
        >>> chunk = TokenChunk.from_logits(torch.tensor([0]), torch.tensor([[0.0, 0.0]]))
        >>> round(CrossEntropy()(chunk).item(), 4)
        0.6931
    """

    fits_text = True

    def forward(self, chunk: TokenChunk) -> Tensor:
        """Return [n], minus the log-probability of each target."""
        return -chunk.target_log_probs()
