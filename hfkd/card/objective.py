"""The objective in words: each term with its formula, and the papers that it is from.

A record that says formula and paper itself is believed. Of an older one, what the losses' docstrings say is read out
of their source files, unimported: torch isn't needed to write a card.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from hfkd.card.citations import arxiv_ids
from hfkd.card.markdown import Markdown, code, joined, plain
from hfkd.card.reading import entries, text, value
from hfkd.schedules import in_words

_TABLES = ("LOSSES", "STATE_LOSSES")
_NOT_SETTINGS = ("name", "kind", "weight", "formula", "paper")


def terms_of(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The terms of the objective: as they were recorded, else as the recipe has them."""
    found = entries(run, "objective") or entries(run, "recipe.loss.terms")
    return [{**term, "formula": formula_of(term), "paper": paper_of(term)} for term in found]


def formula_of(term: Mapping[str, Any]) -> str:
    """What the term computes; empty for a loss from elsewhere that says nothing."""
    return text(term, "formula") or docstring_part(text(term, "kind"), "Formula")


def paper_of(term: Mapping[str, Any]) -> str:
    """Where the term is from; empty where it is from nowhere."""
    paper = text(term, "paper") or docstring_part(text(term, "kind"), "Paper")
    return "" if paper.rstrip(".") == "None" else paper


def term_lines(terms: list[dict[str, Any]]) -> list[Markdown]:
    """One line for each term: weight, name, settings, formula, paper."""
    lines = []
    for term in terms:
        settings = {key: one for key, one in term.items() if key not in _NOT_SETTINGS and one is not None}
        shown = ", ".join(f"{key} {_worded(one)}" for key, one in settings.items())
        head = Markdown(f"{plain(_worded(value(term, 'weight') or 1.0))} x {code(text(term, 'kind', 'unknown'))}")
        head = Markdown(f"{head}: {code(term['formula'])}") if term["formula"] else head
        said = term["paper"].removeprefix("None. ")  # of a loss from nowhere, with what it becomes
        paper = Markdown(f"From: {_linked(said)}" if said == term["paper"] else _linked(said)) if said else ""
        lines.append(joined([head, f"({shown})" if shown else "", paper]))
    return lines


def temperatures(terms: list[dict[str, Any]]) -> list[str]:
    """The temperatures of the terms that have one."""
    return list(dict.fromkeys(_worded(term["temperature"]) for term in terms if value(term, "temperature")))


def _worded(one: Any) -> str:
    if isinstance(one, Mapping):
        try:
            return in_words(one)
        except (KeyError, ValueError, TypeError):
            return str(dict(one))
    return f"{one:g}" if isinstance(one, float) and not one.is_integer() else str(one).removesuffix(".0")


def _linked(paper: str) -> Markdown:
    """A reference with its address as a link; only addresses of arXiv and of the ACM are followed."""
    words = plain(paper)
    linked = re.sub(r"https://(?:arxiv\.org/abs|dl\.acm\.org/doi)/[\w./]*\w", r"<\g<0>>", words)
    return Markdown(linked)


def cited(terms: list[dict[str, Any]]) -> list[str]:
    """The arXiv numbers of the papers of all terms, each once."""
    return list(dict.fromkeys(one for term in terms for one in arxiv_ids(term["paper"])))


def docstring_part(kind: str, name: str) -> str:
    """What the docstring of one of our losses says under a heading, in one line; empty where there is nothing."""
    found = re.search(rf"^{name}:\n((?:[ ]+.*\n?|\n)*)", _docstrings().get(kind, ""), re.MULTILINE)
    return " ".join(found.group(1).split()) if found else ""


@cache
def _docstrings() -> Mapping[str, str]:
    """The docstring of each loss by its key in recipes."""
    folder = resources.files("hfkd").joinpath("losses")
    table = ast.parse(folder.joinpath("__init__.py").read_text(encoding="utf-8"))
    keys: dict[str, str] = {}
    files: dict[str, str] = {}
    for node in table.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            files |= {alias.name: node.module.rpartition(".")[2] for alias in node.names}
        elif isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") in _TABLES:
            pairs = zip(node.value.keys, node.value.values, strict=True)
            keys |= {key.value: loss.id for key, loss in pairs}
    said: dict[str, str] = {}
    for module in sorted({files[name] for name in keys.values()}):
        tree = ast.parse(folder.joinpath(f"{module}.py").read_text(encoding="utf-8"))
        said |= {node.name: ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.ClassDef)}
    return {key: said[name] for key, name in keys.items()}
