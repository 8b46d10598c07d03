"""The losses, by their recipe keys: on tokens in `LOSSES`, on hidden states in `STATE_LOSSES`. One family a file; a
new loss is a class and a line in one of the two.
"""

from __future__ import annotations

from hfkd.losses.adaptive import AdaptiveKL, BalancedKL
from hfkd.losses.alpha_beta import AlphaBeta
from hfkd.losses.base import Divergence, TokenLoss
from hfkd.losses.binary import LogitBinaryKL
from hfkd.losses.clipped import ClippedKL
from hfkd.losses.cross_entropy import CrossEntropy
from hfkd.losses.cross_tokenizer import ULD, SpanLikelihood
from hfkd.losses.hidden import HiddenCosine, HiddenMSE, NormDirection
from hfkd.losses.jensen_shannon import JensenShannon
from hfkd.losses.kl import ForwardKL, ReverseKL
from hfkd.losses.label_smoothing import AdaptiveLabelSmoothing
from hfkd.losses.logits import LogitDivergence, LogitMSE, StandardizedKL
from hfkd.losses.mutual_information import MutualInformation
from hfkd.losses.neighbours import EmbeddingNeighbours
from hfkd.losses.normalized_kd import NormalizedKD
from hfkd.losses.ranking import HingeRanking, LogisticRanking
from hfkd.losses.relation import Relation
from hfkd.losses.sinkhorn import Sinkhorn
from hfkd.losses.skew import SkewForwardKL, SkewReverseKL
from hfkd.losses.span import SpanCorrelation
from hfkd.losses.state import StateLoss, StateRows
from hfkd.losses.swing import Swing
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
    "adaptive_kl": AdaptiveKL,
    "balanced_kl": BalancedKL,
    "alpha_beta": AlphaBeta,
    "normalized_kd": NormalizedKD,
    "adaptive_label_smoothing": AdaptiveLabelSmoothing,
    "embedding_neighbours": EmbeddingNeighbours,
    "clipped_kl": ClippedKL,
    "logit_binary_kl": LogitBinaryKL,
    "logit_mse": LogitMSE,
    "standardized_kl": StandardizedKL,
    "hinge_ranking": HingeRanking,
    "logistic_ranking": LogisticRanking,
    "span_correlation": SpanCorrelation,
    "uld": ULD,
    "span_likelihood": SpanLikelihood,
    "swing": Swing,
}

STATE_LOSSES: dict[str, type[StateLoss]] = {
    "hidden_mse": HiddenMSE,
    "hidden_cosine": HiddenCosine,
    "mutual_information": MutualInformation,
    "relation": Relation,
    "norm_direction": NormDirection,
}

__all__ = [
    "LOSSES",
    "STATE_LOSSES",
    "ULD",
    "AdaptiveKL",
    "AdaptiveLabelSmoothing",
    "AlphaBeta",
    "BalancedKL",
    "ClippedKL",
    "CrossEntropy",
    "Divergence",
    "EmbeddingNeighbours",
    "ForwardKL",
    "HiddenCosine",
    "HiddenMSE",
    "HingeRanking",
    "JensenShannon",
    "LogisticRanking",
    "LogitBinaryKL",
    "LogitDivergence",
    "LogitMSE",
    "MutualInformation",
    "NormDirection",
    "NormalizedKD",
    "Relation",
    "ReverseKL",
    "Sinkhorn",
    "SkewForwardKL",
    "SkewReverseKL",
    "SpanCorrelation",
    "SpanLikelihood",
    "StandardizedKL",
    "StateLoss",
    "StateRows",
    "Swing",
    "TokenLoss",
    "TotalVariation",
]
