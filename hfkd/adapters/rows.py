"""Rows with a question, its rationale, the knowledge that it needs and its answer, as each of three roles reads them.

Formats for `data.train.format`: `hfkd.adapters.rows:intuitive`, `:knowledge` and `:deep`. The deep reasoner's prompt
is written by one function in training and when it is asked, so that both are the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def intuitive(row: Row) -> dict[str, Any]:
    """Question to rationale.

    Args:
        row: With `question`, `rationale` and `answer`.

    Raises:
        ValueError: A column is missing or empty. So do the next ones.
    """
    return {"prompt": _text(row, "question"), "completion": _text(row, "rationale"), "answer": _answer(row)}


def knowledge(row: Row) -> dict[str, Any]:
    """Question to the general rules that it needs; `knowledge` is a text or a list of rules."""
    return {"prompt": _text(row, "question"), "completion": _rules(row)}


def deep(row: Row) -> dict[str, Any]:
    """Question and knowledge to rationale."""
    return {**intuitive(row), "prompt": deep_question(_text(row, "question"), _rules(row))}


def asked(row: Row) -> dict[str, Any]:
    """The question alone (`question` or `prompt`), with its answer where there is one."""
    found = {"prompt": _text(row, "question" if row.get("question") is not None else "prompt")}
    return {**found, "answer": _answer(row)} if row.get("answer") is not None else found


def deep_question(question: str, rules: str) -> str:
    """What the deep reasoner reads: the question, and in the next line the knowledge."""
    return f"{question}\nKnowledge: {' '.join(rules.split())}".rstrip()


def _answer(row: Row) -> str:
    """The short answer; of a rationale in GSM8K's form that which stands behind its mark."""
    return _text(row, "answer").rpartition("####")[2].strip()


def _rules(row: Row) -> str:
    rules = row.get("knowledge")
    if isinstance(rules, Sequence) and not isinstance(rules, str):
        if not all(isinstance(rule, str) for rule in rules):
            raise ValueError(f"the column 'knowledge' holds {rules!r}; expected a text, or a list of texts")
        rules = " ".join(rules)
    return _text({**row, "knowledge": rules}, "knowledge")


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"the column {column!r} holds {value!r} (the row has: {', '.join(row) or 'nothing'}); expected a text"
        )
    return " ".join(value.split()) if column == "knowledge" else value.strip()
