"""What a finished run leaves for people: report, pictures, predictions, the page that tells it, and the card.

Takes plain data; measures nothing and knows no trainer.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from hfkd.card import build_card
from hfkd.eval.predictions import write_predictions
from hfkd.files import write_whole
from hfkd.hub import push
from hfkd.losses.base import docstring_section
from hfkd.objective import Objective
from hfkd.origins import origin_of_model, origin_of_rows
from hfkd.recipe.schema import Recipe
from hfkd.record import RunRecord, rows_fingerprint
from hfkd.report.page import build_page
from hfkd.report.plots import draw_plots
from hfkd.report.written import write_report
from hfkd.run.expected import name_of
from hfkd.run.models import describe_student
from hfkd.run.rewarded_terms import rewarded_terms

if TYPE_CHECKING:
    from hfkd.run.build import Run

PLOTS = "plots"


def write_outcome(
    folder: Path, record: Mapping[str, Any], report: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]
) -> None:
    """Write everything but the weights and `run.json` into the folder of a run.

    Args:
        folder: Of the run.
        record: What `run.json` will hold.
        report: What `report.json` will hold.
        predictions: Lines of `predictions.jsonl`; none writes no file.
    """
    write_report(folder / "report.json", report)
    if predictions:
        write_predictions(folder / "predictions.jsonl", predictions)
    pictures = draw_plots(folder / PLOTS, report)
    write_whole(folder / "recipe.yaml", yaml.safe_dump(record["recipe"], sort_keys=False))
    card = build_card(record, report, files=[f"{PLOTS}/{path.name}" for path in pictures])
    write_whole(folder / "README.md", card)
    page = build_page(record, report, {path.name: path.read_bytes() for path in pictures}, card)
    write_whole(folder / "report.html", page)


def describe_run(run: Run, record: RunRecord) -> None:
    """Put down what a run is made of: rows, models, terms, teacher.

    Args:
        run: Built.
        record: That is written.
    """
    parts = {"train": run.train, "demonstrations": run.demonstrations}
    if run.evaluation is not None:
        parts["evaluation"] = run.evaluation.items
    record.data = {name: rows_fingerprint(rows) for name, rows in parts.items()}
    told = sum(bool(row.get("privileged_context")) for row in run.train)
    record.data["privileged_context"] = {"rows": told}
    record.student = describe_student(run.recipe, run.model)
    student = run.recipe.student
    if record.student["source"] == "folder":
        record.student["weights"] = name_of(student.origin, student.load_kwargs.get("subfolder"))
    record.origins = describe_origins(run)
    record.parameters = {
        "total": sum(parameter.numel() for parameter in run.model.parameters()),
        "trained": sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad),
    }
    rewarded = run.recipe.reinforcement is not None
    record.objective = rewarded_terms(run.recipe) if rewarded else describe_objective(run.objective)
    record.teacher = run.teacher.describe() if run.teacher is not None else {"kind": "none"}


def describe_objective(objective: Objective) -> list[dict[str, Any]]:
    """The terms with what their losses say of themselves, so that a card needs no code of theirs."""
    described = objective.describe()
    for entry, term in zip(described, objective.terms, strict=True):
        for name in ("Formula", "Paper"):
            if said := docstring_section(type(term.loss), name):
                entry[name.lower()] = said
    return described


def describe_origins(run: Run) -> dict[str, dict[str, Any]]:
    """Where student, teacher and training rows are from, with revisions and licences as far as they are known."""
    student, teacher, train = run.recipe.student, run.recipe.teacher, run.recipe.data.train
    origins = {
        "student": origin_of_model(student.origin, student.revision, run.model.config, student.load_kwargs),
        "train": origin_of_rows(train.path, train.revision),
    }
    if run.recipe.data.demonstrations.path is not None:
        origins["demonstrations"] = origin_of_rows(run.recipe.data.demonstrations.path)
    if run.recipe.evaluation is not None and run.recipe.evaluation.path is not None:
        origins["evaluation"] = origin_of_rows(run.recipe.evaluation.path, run.recipe.evaluation.revision)
    if teacher.model is not None:
        origins["teacher"] = origin_of_model(teacher.model, teacher.revision, load_kwargs=teacher.load_kwargs)
    for name, member in teacher.members.items():
        if member.model is not None:
            origins[f"teacher.{name}"] = origin_of_model(member.model, member.revision, load_kwargs=member.load_kwargs)
    return origins


def push_run(recipe: Recipe, folder: Path, console: Console) -> None:
    """Send a finished run to the hub; a failure says how to try again, and the run is not lost.

    Raises:
        OSError: The hub refused it, or can't be reached.
        ValueError: Something in the folder must not be uploaded.
    """
    hub = recipe.hub
    options = {"private": hub.private, "merged": hub.merged, "base": hub.base}
    try:
        push(folder, hub.repo_id, **options, console=console)
    except (OSError, ValueError):
        again = ["hfkd", "push", str(folder), hub.repo_id, *([] if hub.private else ["--public"])]
        again += ["--merged"] if hub.merged else ["--base", hub.base] if hub.base else []
        console.print(
            f"The run is finished and whole. Push it again with: {shlex.join(again)}", markup=False, highlight=False
        )
        raise
