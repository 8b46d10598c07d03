"""Asks a recipe's student its questions: the k-shot accuracy that a run reports, and `hfkd evaluate`.

Trains nothing; how answers are generated and scored is `hfkd.eval.k_shot`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hfkd.eval.k_shot import KShotReport, evaluate_k_shot
from hfkd.masking import shareable
from hfkd.recipe.schema import Recipe
from hfkd.record import write_json
from hfkd.run.build import Run, build_for_evaluation
from hfkd.run.rows import Task

if TYPE_CHECKING:
    from torch import nn


def evaluate_recipe(
    recipe: Recipe, *, adapter: Path | None = None, json_path: Path | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Measure the k-shot accuracy of a recipe's student, without training.

    Args:
        recipe: From `load_recipe`, with an `evaluation` section.
        adapter: A folder with a trained adapter; None asks the student as it is published.
        json_path: Where the results are written too, if given.
        console: Where tables go; None prints to the terminal.

    Returns:
        `k_shot` (accuracies as fractions by number of demonstrations), `details`, and `forgetting` by task.

    Raises:
        ValueError: No `evaluation` section, or no adapter in the folder.
        OSError: A model file is missing or damaged.
    """
    run = build_for_evaluation(recipe, adapter)
    console = console or Console()
    if movable(run.model):
        run.model.to(run.config.device)
    reports = []
    for task in [run.evaluation, *run.forgetting]:
        report = ask(run, run.model, task, f"k-shot {task.name}")
        console.print(report.table(task.name))
        reports.append({"task": task.name, "k_shot": report.accuracies(), "details": plain_results(report)})
    first, *others = reports
    result = {
        "model": recipe.student.origin,
        "adapter": str(adapter) if adapter else None,
        **first,
        "forgetting": others,
    }
    if json_path is not None:
        write_json(json_path, shareable(result))
    return result


def ask(run: Run, model: nn.Module, task: Task, description: str | None) -> KShotReport:
    """The k-shot accuracy of a model on a task, with the settings of the recipe's `evaluation`."""
    settings = run.recipe.evaluation.model_dump(
        include={"tolerance", "max_new_tokens", "batch_size", "seed", "reshuffle"}
    )
    return evaluate_k_shot(
        model, run.tokenizer, task.items, task.demonstrations, run.builder,
        shots=task.shots, extract=task.extract, description=description, **settings,
    )  # fmt: skip


def plain_results(report: KShotReport) -> dict[str, Any]:
    """The results without the single predictions, which would swamp a report."""
    results = report.to_dict()
    for result in results.values():
        result.pop("predictions", None)
    return results


def movable(model: nn.Module) -> bool:
    """Whether a model may be put on another device: a quantised or dispatched one has its place already."""
    return not getattr(model, "is_quantized", False) and getattr(model, "hf_device_map", None) is None
