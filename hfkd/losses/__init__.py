"""The losses on tokens, by their recipe keys. One family a file; a new loss is a class and a line in `LOSSES`."""

from __future__ import annotations

from hfkd.losses.base import Divergence, TokenLoss
from hfkd.losses.cross_entropy import CrossEntropy
from hfkd.losses.jensen_shannon import JensenShannon
from hfkd.losses.kl import ForwardKL, ReverseKL
from hfkd.losses.sinkhorn import Sinkhorn
from hfkd.losses.skew import SkewForwardKL, SkewReverseKL
from hfkd.losses.total_variation import TotalVariation

LOSSES: dict[str, type[TokenLoss]] = {
    "cross_entropy": CrossEntropy,
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jensen_shannon": JensenShannon,
    "skew_forward_kl": SkewForwardKL,
    "skew_reverse_kl": SkewReverseKL,
    "total_variation": TotalVariation,
    "sinkhorn": Sinkhorn,
}

__all__ = [
    "LOSSES",
    "CrossEntropy",
    "Divergence",
    "ForwardKL",
    "JensenShannon",
    "ReverseKL",
    "Sinkhorn",
    "SkewForwardKL",
    "SkewReverseKL",
    "TokenLoss",
    "TotalVariation",
]
