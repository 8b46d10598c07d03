"""How `bench_losses.py` shows what it measured: three tables and a plot. It knows no loss; all is in the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_measuring import print_table, span
from bench_rows import BARE


def print_tables(title: str, report: Mapping[str, Any]) -> None:
    """Print the losses on tokens, those on states, and memory over the rows.

    Args:
        title: The size in words.
        report: From `bench_losses.measure`.
    """
    _print_token_losses(title, report)
    if report["states"]:
        _print_state_losses(report)
    if report["memory"]:
        _print_memory(report)


def _print_token_losses(title: str, report: Mapping[str, Any]) -> None:
    products, rows = report["results"][BARE]["time"], []
    for name, found in report["results"].items():
        if found["why_not"]:
            rows.append((f"{name}: {found['why_not']}", *("-" for _ in range(6))))
            continue
        figures = (f"{found['time']:.3g}", span(found["seconds"]), f"{found['time'] / products:.2f}")
        limit = f"{found['wanted']}" if found["wanted"] else "-"
        added = f"{found['added'] / 1e6:,.0f} MB" if "added" in found else "-"
        rows.append((name, *figures, limit, added, "-" if found["gap"] is None else f"{found['gap']:.0e}"))
    headings = ("what", "seconds (median)", "least to most", "x bare", "wanted", "added memory", "off by")
    print_table(f"Token losses: {title}", headings, rows)


def _print_state_losses(report: Mapping[str, Any]) -> None:
    products, case, rows = report["results"][BARE]["time"], report["case"], []
    for kind, found in report["states"].items():
        milliseconds = [1e3 * one for one in found["seconds"]]
        rows.append(
            (f"hfkd {kind}", f"{1e3 * found['time']:.3g}", span(milliseconds), f"{found['time'] / products:.3f}")
        )
    title = f"Losses on states: N={case['rows']}, H={case['hidden']}, {report['layers']} pairs of layers"
    print_table(title, ("what", "ms (median)", "least to most", "x bare"), rows)


def _print_memory(report: Mapping[str, Any]) -> None:
    case = report["case"]
    rows = [
        (name, f"{count}", *(f"{one[what] / 1e6:,.0f} MB" for what in ("added", "working")))
        for name, figures in report["memory"].items()
        for count, one in figures.items()
    ]
    title = f"Memory over rows: H={case['hidden']}, V={case['vocab']}, trained head"
    print_table(title, ("what", "rows", "added memory", "without the gradients returned"), rows)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw the ratios of time, and memory over the rows.

    Args:
        report: From `bench_losses.measure`.
        path: The picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = {name: found for name, found in report["results"].items() if "time" in found}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 2 + 0.26 * len(timed)), layout="constrained")
    ratios = [found["time"] / timed[BARE]["time"] for found in timed.values()]
    bars = left.barh(list(timed), ratios, color=["C0" if found["wanted"] else "0.65" for found in timed.values()])
    left.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    limits = sorted({found["wanted"] for found in timed.values() if found["wanted"]})
    for place, limit in enumerate(limits):
        left.axvline(limit, color="C3", linestyle=(":", "--", "-.")[place % 3], linewidth=1, label=f"at most {limit}")
    left.invert_yaxis()
    left.set(xlabel="time, in times of the bare matrix products", title="Losses on tokens")
    if limits:
        left.legend(title="wanted", loc="lower right")
    for name, figures in report["memory"].items():
        (line,) = right.plot(list(figures), [one["added"] / 1e6 for one in figures.values()], "o-", label=name)
        working = [one["working"] / 1e6 for one in figures.values()]
        right.plot(list(figures), working, "--", color=line.get_color())
    right.set(xlabel="supervised tokens", ylabel="MB", title="Added memory (dashed: without the gradients returned)")
    if report["memory"]:
        right.set_ylim(bottom=0)
        right.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
