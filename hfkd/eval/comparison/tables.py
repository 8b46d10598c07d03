"""A comparison of runs as tables for a terminal. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_FIGURES = (
    ("agreement with the teacher", ("agreement",), "agreement_interval", True),
    ("… where the teacher is wrong", ("agreement_when_teacher_wrong",), None, True),
    ("KL(teacher || student), nats", ("forward_kl",), "forward_kl_interval", False),
    ("KL(student || teacher), nats", ("reverse_kl",), "reverse_kl_interval", False),
    ("mass on the teacher's likeliest", ("captured_mass", "student"), None, True),
    ("entropy gap, nats", ("entropy", "gap"), None, False),
    ("calibration error", ("student", "expected_calibration_error"), None, True),
    ("Brier score", ("student", "brier"), None, False),
    ("perplexity of the text", ("student", "perplexity"), None, False),
)


def print_comparison(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `compare_sides` found.

    Args:
        found: The comparison.
        console: None prints to the terminal.
    """
    console = console or Console()
    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["rows"]:
        tasks.setdefault(row["task"], []).append(row)
    for task, rows in tasks.items():
        console.print(differences_table(task, found["first"], rows))
    if found["fidelity"]:
        console.print(fidelity_table(found["fidelity"]))
    for line in found["warnings"]:
        console.print(f"Note: {line}", markup=False, highlight=False)


def differences_table(task: str, first: str, rows: list[Mapping[str, Any]]) -> Table:
    """The differences of one task, a line for each way of asking and side; shares are in percent."""
    asked = sorted({row["shared"] for row in rows})
    items = f"{asked[0]} to {asked[-1]}" if len(asked) > 1 else str(asked[0])
    several = len({row["side"] for row in rows}) > 1
    whose = "" if several else f"{escape(rows[0]['side'])} "
    title = f"{escape(task)} ({items} items): {whose}beside {escape(first)}"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.caption = (
        "[ ]: 95 % interval of a paired bootstrap, bold where 0 lies outside and p < 0.05. + / -: items won and lost. "
    )
    table.caption += "Alike: how often both gave the same answer."
    table.caption_justify = "left"
    likeness = any("rationale_similarity" in row for row in rows)
    for heading in ("", *(["Run"] if several else []), "Score", "Difference", "+ / -", "p", "Alike"):
        table.add_column(heading, justify="left" if heading in ("", "Run") else "right", no_wrap=heading != "Run")
    if likeness:
        table.add_column("Texts alike", justify="right")
    for row in rows:
        cells = [row["measure"], *([escape(row["side"])] if several else [])]
        cells.append(f"{_score(row, 'first_score')} → {_score(row, 'score')}")
        cells += [_difference(row), f"{row['gained']} / {row['lost']}", _chance(row["p_value"])]
        cells.append(_same_answer(row.get("answer_agreement") or {}))
        if likeness:
            figures = row.get("rationale_similarity") or {}
            cells.append(", ".join(f"{name} {value:.3g}" for name, value in figures.items()) or "-")
        table.add_row(*cells)
    return table


def fidelity_table(sides: Mapping[str, Mapping[str, Any]]) -> Table:
    """The nearness to the teacher, a column for each side."""
    table = Table(title="Nearness to the teacher", title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in sides:
        table.add_column(escape(name), justify="right")
    for label, path, interval, share in _FIGURES:
        cells = [_cell(figures, path, interval, share) for figures in sides.values()]
        if any(cell != "-" for cell in cells):
            table.add_row(label, *cells)
    return table


def _score(row: Mapping[str, Any], name: str) -> str:
    return f"{100 * row[name]:.1f}" if row["p_value"] is not None else f"{row[name]:.4g}"


def _chance(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _difference(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    if row["p_value"] is None:
        text = f"{row['difference']:+.4g} [{low:+.4g}, {high:+.4g}]"
    else:
        text = f"{100 * row['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    text = escape(text)
    likely = row["p_value"] is not None and row["p_value"] >= 0.05
    return f"[bold]{text}[/bold]" if (low > 0 or high < 0) and not likely else text


def _same_answer(figures: Mapping[str, Any]) -> str:
    return f"{100 * figures['agreement']:.1f}" if figures else "-"


def _cell(figures: Mapping[str, Any], path: tuple[str, ...], interval: str | None, share: bool) -> str:
    value: Any = figures
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float):
        return "-"
    low, high = (figures.get(interval) if interval else None) or (None, None)
    text = f"{value:.1%}" if share else f"{value:.3f}"
    if low is None or low == high:  # of no width: it says nothing
        return text
    return escape(f"{text} [{low:.1%}, {high:.1%}]" if share else f"{text} [{low:.3f}, {high:.3f}]")
