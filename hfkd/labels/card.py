"""The README of labelled rows: what they are, who wrote them, and what to decide before they are shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from hfkd.labels.endpoint import is_this_machine
from hfkd.labels.plan import LabelPlan
from hfkd.masking import shareable, shareable_text


def card_text(plan: LabelPlan, summary: Mapping[str, Any]) -> str:
    """A data set card to go on from, as Markdown.

    Args:
        plan: What was asked.
        summary: What came of it.
    """
    rows, answers = summary["rows"], summary["answers"]
    host = "this machine" if is_this_machine(plan.endpoint.url) else urlsplit(plan.endpoint.url).hostname
    model, source = _code(shareable(plan.endpoint.model)), _code(shareable(plan.data.path))
    filters = ", ".join(_code(one.kind) for one in plan.filters) or "none besides the form of the answer"
    lines = [
        "---",
        "license: unknown  # of the source and of what the teacher's terms allow: decide it before this is shared",
        "tags:",
        "- synthetic",
        "- distillation",
        "configs:",
        "- config_name: default",
        "  data_files: rows.jsonl",
        "---",
        "",
        "# Labels of a teacher",
        "",
        f"The prompts are those of {source}; the completions were written by {model} ({host}), asked through "
        f"`hfkd label` with the template {_code(plan.template.kind)}. No person has checked them.",
        "",
        "| | |",
        "|---|---|",
        f"| rows of the source | {rows['read']} |",
        f"| with a label | {rows['labelled']} |",
        f"| left out | {_counts(rows['rejected'])} |",
        f"| rows to learn | {rows['written']} |",
        f"| answers asked for, kept | {answers['asked']}, {answers['passed']} |",
        f"| filters | {filters} |",
        f"| requests, faults among them | {summary['requests']['sent']}, {_counts(summary['requests']['faults'])} |",
        f"| tokens of prompts, of completions | {summary['tokens']['prompt']}, {summary['tokens']['completion']} |",
        "",
        "`prompt` and `completion` are what a student learns; `answer` is the source's own answer where it has one, "
        "else the teacher's; `source_row` counts from 0.",
        "",
        "Before this is shared: do the terms of whoever runs the teacher allow a model to be trained on its answers, "
        "and what is the licence of the source?",
        "",
    ]
    return "\n".join(lines)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} ({kind})" for kind, count in counts.items()) or "0"


def _code(text: str) -> str:
    """A value that can't become Markdown."""
    return "`" + " ".join(shareable_text(text).replace("`", "'").replace("|", "/").split()) + "`"
