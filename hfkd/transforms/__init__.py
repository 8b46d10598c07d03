"""Training rows made of training rows."""

from __future__ import annotations

from hfkd.transforms.base import RowTransform, Workshop

TRANSFORMS: dict[str, str] = {
    "rejection": "hfkd.transforms.rejection:RejectionSampling",
    "rounds": "hfkd.transforms.rounds:CompetitiveRounds",
    "prune": "hfkd.transforms.prune:PruneRows",
    "influence": "hfkd.transforms.influence:InfluenceWeights",
    "confounders": "hfkd.transforms.confounders:ConfounderRows",
}
"""Recipe keys of the transforms, and where their classes are: `module:Class`, imported when asked for."""

__all__ = ["TRANSFORMS", "RowTransform", "Workshop"]
