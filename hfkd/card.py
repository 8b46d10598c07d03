"""The draft of a model card, from `run.json` and `report.json` alone.

Knows no trainer and no model: what isn't in the two files isn't on the card. What only a person can know is marked
with "TO FILL IN".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from hfkd.schedules import in_words

_WEIGHTS = {
    "adapter_off": "the student's own weights with the adapter switched off",
    "frozen_copy": "a frozen copy of the student as it was before training",
    "live": "the student's own weights as they were at each step",
}
_NAMES = {"before": "before", "after": "after", "gold": "fine-tuned on gold answers", "teacher": "teacher"}


def build_card(run: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The text of a card, metadata first, as `huggingface_hub.ModelCard` reads it.

    Args:
        run: What `run.json` holds.
        report: What `report.json` holds.
    """
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    template = environment.from_string(resources.files("hfkd").joinpath("card.md.jinja").read_text(encoding="utf-8"))
    recipe = run["recipe"]
    text = template.render(
        metadata=_metadata(run),
        title=_title(run),
        run=run,
        recipe=recipe,
        lora=recipe["student"].get("lora"),
        is_hub=_is_hub(run),
        origin=_origin(run),
        kept=_kept(run),
        teacher=_teacher_words(recipe),
        answers=_answers(recipe["data"]),
        teacher_accuracy=_teacher_accuracy(recipe, report.get("k_shot_details") or {}),
        terms=[_term(term) for term in run.get("objective") or recipe["loss"]["terms"]],
        steps=_steps(run, report),
        results=_table(report.get("k_shot_details") or {}),
        forgetting=[(other["task"], _table(other["details"])) for other in report.get("forgetting") or []],
        limits=_limits(run, report),
        command=" ".join(_quoted(part) for part in run.get("command") or []),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _is_hub(run: Mapping[str, Any]) -> bool:
    source = (run.get("student") or {}).get("source")
    return source == "hub" and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", _origin(run)))


def _origin(run: Mapping[str, Any]) -> str:
    """Where the student's weights are from, be it a whole model or a part of one."""
    student = run["recipe"]["student"]
    return student["model"] or student["init"]["from"]


def _kept(run: Mapping[str, Any]) -> str:
    """What the student has of its origin, in words; nothing where it has all."""
    student = run.get("student") or {}
    parts = []
    if kept := student.get("kept_layers"):
        numbers = ", ".join(map(str, kept))
        parts.append(f"{len(kept)} of the {student['layers_before']} blocks ({numbers}; counted from 0)")
    for name, words in (("heads", "attention heads"), ("intermediate", "MLP neurons")):
        if part := (student.get("narrowed") or {}).get(name):
            parts.append(f"{part['kept']} of the {part['of']} {words} of each block")
    return f"{', '.join(parts)} of " if parts else ""


def _metadata(run: Mapping[str, Any]) -> str:
    student = run["recipe"]["student"]
    tags = ["hfkd", "knowledge-distillation", run["recipe"]["teacher"]["kind"].split(":")[0] + "-teacher"]
    if student.get("lora"):
        tags.append("lora")
    data = ModelCardData(
        base_model=_origin(run) if _is_hub(run) else None,
        library_name="peft" if student.get("lora") else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    return data.to_yaml().strip()


def _title(run: Mapping[str, Any]) -> str:
    model = _origin(run).rstrip("/").split("/")[-1]
    data = run["recipe"]["data"]["train"]["path"].rstrip("/").split("/")[-1].rsplit(".", 1)[0]
    return f"{model}, distilled on {data}"


def _teacher_words(recipe: Mapping[str, Any]) -> str:
    teacher, count = recipe["teacher"], recipe["data"]["demonstrations"]["count"]
    if teacher["kind"] == "none":
        return "There was no teacher: the student learned from the answers alone."
    cached = ", read from a cache of what it says" if teacher.get("cache") else ""
    whose = _whose(teacher)
    plural = teacher["kind"] in ("mixture", "routed")
    begins = f"The teachers are {whose}; they" if plural else f"The teacher is {whose}{cached}; it"
    return f"{begins} read {count} demonstrations before each question."


def _whose(teacher: Mapping[str, Any]) -> str:
    """Whose weights teach."""
    kind = teacher["kind"]
    if teacher.get("members"):
        joined = ", ".join(f"{name} ({_whose(member)})" for name, member in teacher["members"].items())
        how = "by the column of each row" if kind == "routed" else "mixed by their weights"
        return f"{joined}, {how}"
    if kind == "self":
        return _WEIGHTS[teacher["weights"]]
    if kind == "ema":
        often = "step" if teacher["interval"] == 1 else f"{teacher['interval']} steps"
        return f"a moving average of the student's weights (decay {teacher['decay']} every {often})"
    if kind == "snapshot":
        every = teacher["every"]
        when = "at the end of the epoch before" if every == "epoch" else f"up to {every} steps before"
        return f"the student as it was {when}"
    revision = f" at revision `{teacher['revision']}`" if teacher["revision"] else ""
    return f"`{teacher['model'] or kind}`{revision}"


def _answers(data: Mapping[str, Any]) -> str:
    """Whose answers were learned."""
    answer = data.get("answer", "dataset")
    if answer in ("dataset", "teacher"):
        whose = "the teacher's own" if answer == "teacher" else "those of the data set"
        return f"The answers are {whose}."
    shares = {answer: 1.0} if isinstance(answer, str) else answer
    total = sum(shares.values())
    whose = {
        "student": "written by the student itself",
        "teacher": "written by the teacher",
        "dataset": "the data set's",
    }
    named = [f"{whose[name]} in {share / total:.0%} of the steps" for name, share in shares.items() if share]
    return f"The answers are {', '.join(named)}; what was written, was written anew for its step."


def _teacher_accuracy(recipe: Mapping[str, Any], details: Mapping[str, Mapping[str, Any]]) -> str:
    """The teacher's own accuracy where it was measured: a frozen self-teacher is the student before training."""
    count = str(recipe["data"]["demonstrations"]["count"])
    frozen = recipe["teacher"]["kind"] == "self" and recipe["teacher"]["weights"] != "live"
    results = details.get("teacher") or (details.get("before") if frozen else None) or {}
    return (
        f"With them it answers {_cell(results[count])} of the held-out items rightly itself."
        if count in results
        else ""
    )


def _term(term: Mapping[str, Any]) -> dict[str, Any]:
    settings = {
        key: value for key, value in term.items() if key not in ("name", "kind", "weight") and value is not None
    }
    shown = ", ".join(
        f"{key} {in_words(value) if isinstance(value, Mapping) else value}" for key, value in settings.items()
    )
    return {
        "kind": term["kind"],
        "weight": in_words(term.get("weight", 1.0)),
        "settings": shown,
        "formula": _formula(term["kind"]),
    }


def _formula(kind: str) -> str:
    """What the loss's own docstring says; nothing for one from elsewhere."""
    from hfkd.losses import LOSSES, STATE_LOSSES
    from hfkd.losses.base import docstring_section

    loss = {**LOSSES, **STATE_LOSSES}.get(kind)
    return "" if loss is None else docstring_section(loss, "Formula")


def _steps(run: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    history = report.get("loss_history") or []
    steps = run["recipe"]["training"].get("max_steps") or (history[-1]["step"] if history else 0)
    words = f"{steps} optimizer steps" if steps and steps > 0 else "Training"
    if history:
        words += f"; the logged loss went from {history[0]['loss']:.4g} to {history[-1]['loss']:.4g} nats per token"
    return words + "."


def _table(details: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracies by shots (rows) and model (columns), with what has to be read beside them."""
    names = list(details)
    shots = sorted({int(count) for results in details.values() for count in results})
    rows = []
    for count in shots:
        results = {name: details[name].get(str(count)) for name in names}
        found = [result for result in results.values() if result]
        rows.append(
            {
                "shots": count,
                "cells": [_cell(result) for result in results.values()],
                "constant": f"{found[0]['most_frequent_share']:.1%}",
                "distinct": " / ".join(
                    str(result["distinct_answers"]) if result else "-" for result in results.values()
                ),
            }
        )
    first = next((result for results in details.values() for result in results.values()), None)
    verdicts = [
        f"{_NAMES.get(name, name)}, {count}-shot: {result['verdict']}"
        for name, results in details.items()
        for count, result in results.items()
        if result["verdict"]
    ]
    heads = [_NAMES.get(name, name) for name in names]
    return {"names": heads, "rows": rows, "count": first["items"] if first else 0, "verdicts": verdicts}


def _cell(result: Mapping[str, Any] | None) -> str:
    return f"{result['accuracy']:.1%} ± {result['standard_error']:.1%}" if result else "-"


def _limits(run: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    limits = ["One run with one seed; the standard errors say how far the choice of items alone could move a figure."]
    details = report.get("k_shot_details") or {}
    if not details:
        limits.append("Nothing was evaluated in this run, so nothing is known of what the model can do.")
    if run["recipe"]["teacher"]["kind"] != "none":
        limits.append(
            "The student learned what the teacher says, right or wrong; it is not expected to be better than "
            "the teacher."
        )
    if run["recipe"]["data"]["answer"] == "teacher":
        limits.append("The training answers were written by the teacher and were not checked.")
    elif run["recipe"]["data"]["answer"] != "dataset":
        limits.append("Training answers that a model wrote were not checked.")
    if any(result["verdict"] for results in details.values() for result in results.values()):
        limits.append("Some figures are no better than a constant answer; see the remarks below the table.")
    for other in report.get("forgetting") or []:
        limits += _forgotten(other)
    if not report.get("forgetting"):
        limits.append("What the model forgot of other tasks was not measured.")
    return limits


def _forgotten(other: Mapping[str, Any]) -> list[str]:
    before, after = other["k_shot"].get("before", {}), other["k_shot"].get("after", {})
    falls = {
        count: before[count] - after[count] for count in before if count in after and after[count] < before[count]
    }
    if not falls:
        return []
    worst = max(falls, key=lambda count: falls[count])
    return [f"On {other['task']} it lost {falls[worst]:.1%} of the items with {worst} demonstrations in the prompt."]


def _quoted(part: str) -> str:
    return part if re.fullmatch(r"[\w./:=,@+~-]+", part) else "'" + part.replace("'", "'\\''") + "'"
