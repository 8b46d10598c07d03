"""Puts a card together: each part is made by a module of its own, the template says where it stands."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from hfkd.card.citations import GKD, LORA, SECOKD, bibtex
from hfkd.card.course import ending
from hfkd.card.differences import difference_rows
from hfkd.card.fidelity import fidelity_remarks, fidelity_table, fidelity_words, worst_tokens
from hfkd.card.limits import limits, teacher_figure
from hfkd.card.markdown import Markdown, block, bullets, code, code_cell, joined, plain, table
from hfkd.card.marker import marked
from hfkd.card.metadata import licence, licence_words, metadata
from hfkd.card.methods import method_papers, methods_lines
from hfkd.card.objective import cited, temperatures, term_lines, terms_of
from hfkd.card.reading import count, section, text
from hfkd.card.results import (
    accuracy_of,
    accuracy_section,
    details_of,
    items_of,
    other_tasks,
)
from hfkd.card.teaching import shots_words, teacher_words
from hfkd.card.usage import asking_code, asking_words, loading_code, loading_words, merging_code, reproducing
from hfkd.card.words import (
    answers_words,
    done,
    energy_words,
    hardware_words,
    has_adapter,
    lengths_words,
    origins_table,
    time_words,
    title,
)
from hfkd.masking import shareable

_PICTURE = re.compile(r"(plots/)?[\w-]+\.png")
_SEEN_ON = {
    "plots/loss.png": "The loss over the steps, by term",
    "plots/accuracy.png": "Accuracy by the number of demonstrations, before and after",
    "plots/reliability.png": "Reliability of student and teacher: how often they are right when they are so sure",
    "plots/agreement.png": "Agreement with the teacher by position in the answer",
    "plot.png": "The loss over the steps, and accuracy by the number of demonstrations",
}


def build_card(
    run: Mapping[str, Any],
    report: Mapping[str, Any],
    *,
    files: Collection[str] = (),
    missing: Sequence[str] = (),
    merged: bool = False,
) -> str:
    """The text of a card, metadata first, as `huggingface_hub.ModelCard` reads it, its digest last.

    Args:
        run: What `run.json` holds; any part of it may be missing.
        report: What `report.json` holds; likewise.
        files: The files of the folder, as paths in it; pictures among them are shown.
        missing: What isn't there, in words; the card says so.
        merged: The card is for the adapter merged into its base, a whole model.
    """
    run, report = (
        shareable({**section(run), "merged": merged or bool(section(run).get("merged"))}),
        _shareable(section(report)),
    )
    parts = {**_story(run, report), **_figures(run, report), **_handling(run, report, files)}
    written = _template().render(
        metadata=Markdown(metadata(run, report)),
        title=title(run),
        licence=licence_words(run),
        licensed=bool(licence(run)),
        missing=bullets(missing),
        **parts,
    )
    return marked(re.sub(r"\n{3,}", "\n\n", written).strip() + "\n")


def _shareable(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report without what is secret; of the history numbers alone are read, and it may be long."""
    rest = {key: one for key, one in report.items() if key != "loss_history"}
    return {**shareable(rest), "loss_history": report.get("loss_history")}


@cache
def _template() -> Template:
    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        autoescape=False,
        finalize=plain,  # whatever isn't Markdown yet is escaped
    )
    source = resources.files("hfkd.card").joinpath("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)


def _story(run: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """What was done, with what."""
    terms = terms_of(run)
    return {
        "ending": ending(run),
        "done": done(run, report),
        "origins": origins_table(run),
        "teacher": teacher_words(run),
        "teacher_accuracy": _teacher_accuracy(run, report),
        "shots": shots_words(run),
        "data": _data(run),
        "train": _train(run),
        "answers": answers_words(run),
        "empty": count(run, "data.teacher_answers.empty"),
        "lengths": lengths_words(run),
        "methods": bullets(methods_lines(run)),
        "terms": bullets(term_lines(terms)),
        "temperatures": temperatures(terms),
        "bibtex": _bibtex(run, cited(terms)),
    }


def _figures(run: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """What came of it."""
    details = details_of(report)
    return {
        "results": accuracy_section(details),
        "differences": _differences(report, "", details),
        "items": items_of(details),
        "others": [
            (name, items_of(one), accuracy_section(one), _differences(report, name, one))
            for name, one in other_tasks(report)
        ],
        "fidelity": fidelity_table(run, report),
        "fidelity_words": fidelity_words(run, report),
        "fidelity_remarks": bullets(fidelity_remarks(run, report)),
        "worst": worst_tokens(report),
        "unavailable": text(report, "fidelity.unavailable").rstrip("."),
        "limits": bullets(limits(run, report)),
    }


def _differences(report: Mapping[str, Any], task: str, details: Mapping[str, Any]) -> Markdown:
    heads, rows = difference_rows(report, task, details)
    return table(heads, rows)


def _handling(run: Mapping[str, Any], report: Mapping[str, Any], files: Collection[str]) -> dict[str, Any]:
    """How to load it, to make it again, and on what machine it was made."""
    versions = section(run, "versions")
    return {
        "pictures": [_picture(name) for name in sorted(files) if _PICTURE.fullmatch(name)],
        "loading": loading_code(run),
        "loading_words": loading_words(run),
        "merging": merging_code(run),
        "asking": asking_code(run),
        "asking_words": asking_words(run),
        "reproducing": reproducing(run, files),
        "hardware": hardware_words(run),
        "time": time_words(run, report),
        "energy": energy_words(run),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or "not recorded",
    }


def _data(run: Mapping[str, Any]) -> Markdown:
    """Rows and digest of each part."""
    parts = {name: section(run, f"data.{name}") for name in section(run, "data") if text(run, f"data.{name}.sha256")}
    rows = [(name, count(part, "rows"), code_cell(text(part, "sha256")[:16])) for name, part in parts.items()]
    return table(("part", "rows", "sha256 of the rows"), rows)


def _train(run: Mapping[str, Any]) -> Markdown:
    train = section(run, "recipe.data.train")
    if not text(train, "path"):
        return Markdown("")
    named = f" ({plain(text(train, 'name'))})" if text(train, "name") else ""
    split = "" if text(run, "origins.train.source") == "file" else f", split {code(text(train, 'split', 'train'))}"
    return Markdown(f"{code(text(train, 'path'))}{named}{split}")


def _teacher_accuracy(run: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The teacher's own accuracy, where it was measured."""
    details = details_of(report)
    stage, shots = teacher_figure(run, details)
    found = accuracy_of(details, stage, shots) if stage else None
    return f"With {shots} of them it answers {found} of the held-out items rightly itself." if found else ""


def _picture(name: str) -> Markdown:
    stem = name.rpartition("/")[2].removesuffix(".png")
    other = f"Accuracy on another task, {stem.removeprefix('accuracy-')}" if stem.startswith("accuracy-") else stem
    return joined([Markdown(f"![{_SEEN_ON.get(name, other)}]({name})")])


def _bibtex(run: Mapping[str, Any], ids: list[str]) -> Markdown:
    """The papers of the terms and of the method."""
    found = list(ids)
    kind, shown = text(run, "recipe.teacher.kind"), count(run, "recipe.data.demonstrations.count")
    if kind == "self" and shown:
        found.append(SECOKD)
    answer = section(run, "recipe.data").get("answer")
    if answer == "student" or (isinstance(answer, Mapping) and answer.get("student")):
        found.append(GKD)
    found += {"ema": ["1703.01780"], "snapshot": ["2006.12000"], "early_exit": ["2406.09719"]}.get(kind, [])
    found += method_papers(run)
    if has_adapter(run):
        found.append(LORA)
    cited_papers = bibtex(found)
    return block(cited_papers, "bibtex") if cited_papers else Markdown("")
