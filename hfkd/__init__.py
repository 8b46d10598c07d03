"""hfkd: knowledge distillation of causal language models on the Hugging Face stack.

The names below are loaded when they are first used, so that `import hfkd` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "DistillationTrainer": "hfkd.trainer",
    "DistillationConfig": "hfkd.config",
    "Objective": "hfkd.objective",
    "build_objective": "hfkd.objective",
    "Schedule": "hfkd.schedules",
    "Divergence": "hfkd.losses",
    "TokenLoss": "hfkd.losses",
    "StateLoss": "hfkd.losses",
    "LOSSES": "hfkd.losses",
    "STATE_LOSSES": "hfkd.losses",
    "Teacher": "hfkd.teachers",
    "LocalTeacher": "hfkd.teachers",
    "SelfTeacher": "hfkd.teachers",
    "EmaTeacher": "hfkd.teachers",
    "SnapshotTeacher": "hfkd.teachers",
    "EarlyExitTeacher": "hfkd.teachers",
    "CachedTeacher": "hfkd.teachers",
    "CacheError": "hfkd.cache",
    "MixtureTeacher": "hfkd.teachers",
    "RoutedTeacher": "hfkd.teachers",
    "CrossTokenizerTeacher": "hfkd.teachers",
    "Rollout": "hfkd.rollout",
    "HFRollout": "hfkd.rollout",
    "VllmRollout": "hfkd.rollout",
    "OffPolicyBuffer": "hfkd.rollout",
    "GenerationSettings": "hfkd.rollout",
    "PromptStyle": "hfkd.data.prompts",
    "PromptBuilder": "hfkd.data.prompts",
    "DistillationDataset": "hfkd.data.views",
    "DistillationCollator": "hfkd.data.collate",
    "Source": "hfkd.data.load",
    "load_rows": "hfkd.data.load",
    "ExampleSampler": "hfkd.sampling",
    "Reviser": "hfkd.revision",
    "RowTransform": "hfkd.transforms",
    "KDRLTrainer": "hfkd.reinforcement",
    "KDRLConfig": "hfkd.reinforcement",
    "evaluate_k_shot": "hfkd.eval.k_shot",
    "measure_fidelity": "hfkd.eval.fidelity",
    "KShotCallback": "hfkd.eval.tracking",
    "load_recipe": "hfkd.recipe",
    "run_recipe": "hfkd.run",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from hfkd.config import DistillationConfig as DistillationConfig
    from hfkd.trainer import DistillationTrainer as DistillationTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hfkd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
