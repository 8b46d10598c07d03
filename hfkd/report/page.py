"""A run as one HTML page, from `run.json`, `report.json` and the pictures alone.

The page asks nobody for anything: pictures and style are in it, there is no script, and its own policy forbids both
scripts and requests. What the files don't say is left out, with a line that says so. Knows no model and no trainer.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from hfkd.card.course import ending
from hfkd.card.differences import difference_rows
from hfkd.card.fidelity import columns_of, fidelity_remarks, interval_of
from hfkd.card.limits import limits
from hfkd.card.reading import count, entries, number, section, text
from hfkd.card.results import STAGES, accuracy_of, details_of, items_of, other_tasks, shots_of, verdicts
from hfkd.card.teaching import prompts_words
from hfkd.card.words import title
from hfkd.masking import shareable, shareable_text
from hfkd.report.page_facts import data_rows, duration_rows, facts_of, objective_of, origin_rows
from hfkd.report.written import accuracy_pictures

_PNG = b"\x89PNG\r\n\x1a\n"
_ALTERNATIVES = {
    "loss": "Line chart of the loss over the training steps, by term.",
    "accuracy": "Line chart of the accuracy by demonstrations in the prompt, with 95 % intervals; its figures are in "
    "the table above it.",
    "reliability": "Reliability diagram: how often each model is right against how sure it was, with the number of "
    "tokens in each bin.",
    "agreement": "Line charts by place in the answer: share of tokens whose likeliest is the teacher's, KL from the "
    "teacher, and number of tokens.",
}
_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}


def build_page(
    run: Mapping[str, Any], report: Mapping[str, Any], pictures: Mapping[str, bytes], card: str = ""
) -> str:
    """The page as a text, to be written as UTF-8.

    Args:
        run: What `run.json` holds; any part may be missing.
        report: What `report.json` holds; any part may be missing.
        pictures: PNG files by name, as `draw_plots` names them; what is no PNG is left out.
        card: The model card, shown as it is written.
    """
    history = entries(report, "loss_history")
    run = _clean(shareable(run))
    report = {
        **_clean({key: value for key, value in report.items() if key != "loss_history"}),
        "loss_history": history,
    }
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=True)
    environment.filters |= {"visible": _visible, "digest": _digest, "figure": _number_words}
    template = environment.from_string(
        resources.files("hfkd.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    page = template.render(
        title=title(run),
        status=text(run, "status"),
        ending=ending(run),
        facts=facts_of(run, report),
        objective=objective_of(run),
        origins=origin_rows(run),
        data=data_rows(run),
        durations=duration_rows(run, report),
        tasks=_tasks(report),
        limits=limits(run, report),
        fidelity=_fidelity(run, report),
        worst=_worst(report),
        loss=_loss_ends(history),
        pictures=_pictures(pictures),
        command=" ".join(map(str, command)) if isinstance(command := run.get("command"), list) else "",
        recipe=_yaml(run.get("recipe")),
        versions=section(run, "versions"),
        fingerprint=text(run, "fingerprint"),
        card=_clean(card),
    )
    return page.strip() + "\n"


def _clean(value: Any) -> Any:
    """Plain data without secrets, folders of this machine, and letters that UTF-8 has no bytes for."""
    if isinstance(value, Mapping):
        return {_clean(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, str):
        return shareable_text(value).encode("utf-8", "replace").decode("utf-8")
    return value


def _tasks(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables of the trained task, which has no name, and of the others."""
    found = [("", details_of(report)), *other_tasks(report)]
    names = [name.removesuffix(".png") for name in accuracy_pictures(report)]
    tables = zip(found, names, strict=True)
    return [
        {"name": task, "picture": name, "paired": difference_rows(report, task, rows), **_table(rows)}
        for (task, rows), name in tables
        if shots_of(rows)
    ]


def _table(details: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracies by demonstrations (rows) and model (columns), with what has to be read beside them."""
    stages = [stage for stage in details if shots_of({stage: section(details, stage)})]
    rows = []
    for shots in shots_of(details):
        results = [section(section(details, stage), shots) for stage in stages]
        constants = [one for one in (number(result, "most_frequent_share") for result in results) if one is not None]
        given = [str(count(result, "distinct_answers", -1)).replace("-1", "–") for result in results]
        rows.append(
            {
                "shots": shots,
                "cells": [_accuracy(details, stage, shots) for stage in stages],
                "constant": _percent(constants[0] if constants else None),
                "given": " / ".join(given),
            }
        )
    names = [STAGES.get(stage, stage) for stage in stages]
    return {"stages": names, "rows": rows, "asked": items_of(details), "verdicts": verdicts(details)}


def _accuracy(details: Mapping[str, Any], stage: str, shots: str) -> dict[str, str]:
    found = accuracy_of(details, stage, shots)
    known = found is not None and found.high - found.low < 1
    return _cell(found and found.share, (found.low, found.high) if known else None, _percent)


def _fidelity(run: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """The table of the fidelity, a column for each student and teacher; or why there is none."""
    columns = columns_of(run, report)
    if not columns:
        return {"unavailable": text(report, "fidelity.unavailable"), "rows": []}
    last = columns[-1][1]
    rows = [
        {
            "words": words,
            "meaning": meaning,
            "cells": [
                _cell(number(part, key), interval_of(part, f"{key}_interval"), show)
                if side == "student"
                else _cell(number(part, of_teacher), None, show if of_teacher else lambda _: "")
                for _, part, side in columns
            ],
        }
        for words, meaning, key, of_teacher, show in _figures(
            count(last, "captured_mass.k"), count(last, "teacher_wrong")
        )
    ]
    counts = {key: count(last, key) for key in ("texts", "tokens", "teacher_wrong")}
    found = {"heads": [head for head, _, _ in columns], "rows": rows, **counts}
    return {**found, "prompts": prompts_words(run), "remarks": fidelity_remarks(run, report)}


def _figures(top: int, wrong: int) -> tuple[tuple[str, str, str, str, Callable[[Any], str]], ...]:
    """Words, what they mean, where the figure is, where that of the teacher is, and how both are shown."""
    error = "expected_calibration_error"
    return (
        ("Agreement", "tokens whose likeliest one is the teacher's", "agreement", "", _percent),
        (
            "… where the teacher is wrong",
            f"on {wrong} tokens: its mistakes, learned too",
            "agreement_when_teacher_wrong",
            "",
            _percent,
        ),
        ("Forward KL", "KL(teacher ‖ student), nats per token", "forward_kl", "", _number_words),
        ("Reverse KL", "KL(student ‖ teacher), nats per token", "reverse_kl", "", _number_words),
        (f"Mass on {top} tokens", f"on the teacher's {top} likeliest", *_both("captured_mass"), _percent),
        ("Entropy", "how undecided the model is, nats per token", *_both("entropy"), _number_words),
        ("Right tokens", "the likeliest token is the text's", "student.accuracy", "teacher.accuracy", _percent),
        ("Perplexity", "of the text; 1 is certainty", "student.perplexity", "teacher.perplexity", _number_words),
        ("Calibration error", "how far off its own certainty is", f"student.{error}", f"teacher.{error}", _percent),
        ("Brier score", "of its probabilities; 0 is best, 2 worst", "student.brier", "teacher.brier", _number_words),
    )


def _both(name: str) -> tuple[str, str]:
    return f"{name}.student", f"{name}.teacher"


def _worst(report: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens that cost most, of the last stage that has them."""
    for stage in reversed(section(report, "fidelity")):
        if tokens := entries(report, f"fidelity.{stage}.worst_tokens"):
            keys = ("text", "teacher", "student", "tokens", "forward_kl", "total")
            return {
                "stage": STAGES.get(stage, stage),
                "tokens": [{key: one.get(key) for key in keys} for one in tokens],
            }
    return {"stage": "", "tokens": []}


def _loss_ends(history: Sequence[Mapping[str, Any]]) -> str:
    logged = [(number(entry, "step"), number(entry, "loss")) for entry in history]
    logged = [(step, loss) for step, loss in logged if step is not None and loss is not None]
    if not logged:
        return ""
    (first, high), (last, low) = logged[0], logged[-1]
    return f"The logged loss was {high:.4g} at step {first:g} and {low:.4g} at step {last:g}, in nats per token."


def _pictures(pictures: Mapping[str, bytes]) -> dict[str, list[dict[str, str]]]:
    """By what they show, the first word of the name: source and words for those who don't see them."""
    found: dict[str, list[dict[str, str]]] = {kind: [] for kind in (*_ALTERNATIVES, "other")}
    for name, content in pictures.items():
        stem = name.rpartition("/")[2].removesuffix(".png")
        kind = stem.partition("-")[0]
        if content.startswith(_PNG):
            source = f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
            words = _ALTERNATIVES.get(kind, f"Picture {stem}.")
            picture = {"name": _clean(stem), "source": source, "words": _clean(words)}
            found[kind if kind in _ALTERNATIVES else "other"].append(picture)
    return found


def _yaml(recipe: Any) -> str:
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100) if recipe else ""


def _digest(style: str) -> str:
    """As a Content-Security-Policy names the one style that is allowed."""
    return base64.b64encode(hashlib.sha256(str(style).encode("utf-8")).digest()).decode("ascii")


def _cell(value: float | None, ends: tuple[float, float] | None, show: Callable[[Any], str]) -> dict[str, str]:
    return {"value": show(value), "interval": f"{show(ends[0])} to {show(ends[1])}" if ends else ""}


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number_words(value: Any) -> str:
    found = number({"one": value}, "one")
    if found is None or isinstance(found, int):
        return "–" if found is None else f"{found:,}"
    return f"{found:.3f}" if abs(found) < 10 else f"{found:,.1f}"


def _visible(token: Any) -> str:
    """A token with spaces and line ends that can be seen, and no letter that turns the writing around."""
    letters = str("" if token is None else token)
    return "".join(_VISIBLE.get(one) or (one if one.isprintable() else f"\\u{ord(one):04x}") for one in letters)
