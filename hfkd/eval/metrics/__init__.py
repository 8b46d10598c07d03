"""Fidelity as `evaluate.Metric` modules that lie in this package: nothing is fetched from a hub.

Each module is a file of its own that `evaluate.load(metric_path(name))` takes as it is. `load_metric` makes the same
metric without copying the file to evaluate's cache. What they compute with is `hfkd.measures`, which the report
of a run uses too.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import evaluate

METRICS = {
    "token_agreement": "TokenAgreement",
    "kl_divergence": "KLDivergence",
    "captured_mass": "CapturedMass",
    "entropy_gap": "EntropyGap",
    "calibration": "Calibration",
    "perplexity": "Perplexity",
    "worst_tokens": "WorstTokens",
    "answer_agreement": "AnswerAgreement",
    "rationale_similarity": "RationaleSimilarity",
    "forgetting": "Forgetting",
    "canary_exposure": "CanaryExposure",
}
"""The metrics by name: a module of this package, and the class in it."""


def metric_path(name: str) -> str:
    """The file of a metric, for `evaluate.load`.

    Args:
        name: In `METRICS`.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; expected one of {', '.join(METRICS)}.")
    return str(Path(__file__).with_name(f"{name}.py"))


def load_metric(name: str, **settings: Any) -> evaluate.Metric:
    """Make a metric.

    Args:
        name: In `METRICS`.
        **settings: Of `evaluate.Metric`, such as `num_process` and `process_id`. With one process what is added stays
            in memory unless `keep_in_memory` says otherwise.

    Raises:
        ValueError: There is none of that name.
    """
    metric_path(name)
    module = importlib.import_module(f"{__name__}.{name}")
    settings.setdefault("keep_in_memory", settings.get("num_process", 1) == 1)
    return getattr(module, METRICS[name])(**settings)


__all__ = ["METRICS", "load_metric", "metric_path"]
