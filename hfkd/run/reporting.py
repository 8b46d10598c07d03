"""What a run measured, and the report that is made of it. Measures nothing itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hfkd.eval.comparison.compare import paired
from hfkd.eval.k_shot import KShotReport
from hfkd.masking import shareable
from hfkd.run.evaluation import plain_results

SCHEMA = 1
_PAIRS = (("before", "after"), ("gold", "after"))
Reports = Mapping[str, KShotReport]


@dataclass
class Measured:
    """The figures of a run, as they come in.

    Attributes:
        forgetting: The reports on each task that wasn't trained, by stage, in the order of the recipe.
        k_shot: The reports on the trained task, by stage.
        fidelity: What `FidelityReport.to_dict` says, by stage; or why there is nothing, under `unavailable`.
        predictions: Lines of `predictions.jsonl`.
        history: Log entries with a loss.
        curve: Log entries of evaluations in training.
    """

    forgetting: list[dict[str, KShotReport]]
    k_shot: dict[str, KShotReport] = field(default_factory=dict)
    fidelity: dict[str, Any] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    def keep_log(self, entries: Sequence[Mapping[str, float]]) -> None:
        """Take what a trainer logged."""
        self.history = [dict(entry) for entry in entries if "loss" in entry and "step" in entry]
        self.curve = [dict(entry) for entry in entries if any(key.startswith("eval_") for key in entry)]

    def report(
        self, task: str, others: Sequence[str], metrics: Mapping[str, Any], durations: Mapping[str, float]
    ) -> dict[str, Any]:
        """What `report.json` holds: JSON values, no path of this machine, null where a figure is no number.

        Args:
            task: Name of the trained task.
            others: Names of the other tasks.
            metrics: Of the training.
            durations: Seconds by stage.
        """
        named = [(task, self.k_shot), *zip(others, self.forgetting, strict=True)]
        report = {
            "schema": SCHEMA,
            "k_shot": _accuracies(self.k_shot),
            "k_shot_details": _details(self.k_shot),
            "forgetting": [
                {"task": name, "k_shot": _accuracies(reports), "details": _details(reports)}
                for name, reports in named[1:]
            ],
            "differences": [one for name, reports in named for one in paired_differences(name, reports)],
            "fidelity": self.fidelity,
            "loss_history": self.history,
            "evaluation_history": self.curve,
            "training": dict(metrics),
            "durations": dict(durations),
        }
        return _finite(shareable(report))


def paired_differences(task: str, reports: Reports) -> Iterator[dict[str, Any]]:
    """What training changed, and what it is worth beside the gold answers, item by item.

    Args:
        task: Its name.
        reports: By stage; all asked the same items.

    Returns:
        `task`, `shots`, `from`, `to`, `items`, the `difference` of the accuracies with its 95 % `interval` (paired
        bootstrap) and the `p_value` of McNemar's exact test, for each pair of stages and number of demonstrations.
    """
    for first, second in _PAIRS:
        if first not in reports or second not in reports:
            continue
        for shots, result in reports[second].results.items():
            former = reports[first].results.get(shots)
            if former is None or len(former.right) != len(result.right):
                continue
            found = paired(former.right, result.right)
            kept = {name: found[name] for name in ("difference", "interval", "p_value")}
            pair = {"task": task, "shots": str(shots), "from": first, "to": second, "items": len(result.right)}
            yield {**pair, **kept}


def _accuracies(reports: Reports) -> dict[str, Any]:
    return {stage: report.accuracies() for stage, report in reports.items()}


def _details(reports: Reports) -> dict[str, Any]:
    return {stage: plain_results(report) for stage, report in reports.items()}


def _finite(value: Any) -> Any:
    """A copy in which what isn't finite is null: JSON has no word for it, and a lost report helps nobody."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
