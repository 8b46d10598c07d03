"""Negative-aware fine-tuning: learning from right and wrong answers alike, as one maximum-likelihood loss.

Pure arithmetic on tensors. The answers to a prompt were drawn by an old policy; with the share r of right ones it is a
mixture of a policy that is always right and one that is always wrong. What the student is fitted to be, the first one,
says by that what the second one is, and each wrong answer is a sample of that one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nft_loss(log_ratio: Tensor, reward: Tensor, success: Tensor, floor: float = 1.0) -> Tensor:
    """The loss of each token.

    Formula:
        -(1 - r) [y log(x) + (1 - y) log max((1 - r x) / (1 - r), floor)], x = student now / student when it drew,
        y the answer's reward, r the mean reward of its prompt's answers. Below the floor the value is the floor's and
        the gradient goes on.
    Args:
        log_ratio: [B, T] log x, in the graph.
        reward: [B] from 0 to 1.
        success: [B] the mean reward of the answers to the same prompt.
        floor: Of the likelihood ratio of the wrong policy, > 0.
    Returns:
        [B, T]; 0 where all answers to the prompt are right, or all are wrong. With weights that drew themselves the
        gradient by log x is -(y - r), that of Dr. GRPO.
    Paper:
        Chen et al., 2025, https://arxiv.org/abs/2505.18116. Ours: rewards between 0 and 1 count in proportion. Token
        losses are averaged over all tokens of the step, those of prompts that teach nothing included.
    """
    reward, success = reward[:, None], success[:, None]
    tells = (success > 0) & (success < 1)
    rest = torch.where(tells, 1 - success, 1.0)
    wrong = (1 - torch.where(tells, success, 0.0) * log_ratio.exp()) / rest
    held = wrong + (wrong.clamp(min=floor) - wrong).detach()
    loss = -rest * (reward * log_ratio + (1 - reward) * held.log())
    return torch.where(tells, loss, 0.0)
