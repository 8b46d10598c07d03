"""The pictures of a run, from its report alone: the loss by term, and the accuracy by demonstrations.

Each is drawn where its figures are there, and not otherwise. `hfkd.report.fidelity_plots` has those of the fidelity.
Knows no model and no trainer; it takes plain values, as they are read from a `report.json`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from hfkd.card.reading import entries, pair, section
from hfkd.card.results import details_of, other_tasks, shots_of
from hfkd.report.drawing import (
    INK,
    LOOKS,
    PALE,
    WARNING,
    Look,
    foot,
    head,
    looks_of,
    number,
    percent_axis,
    picture,
    share_interval,
    shown_name,
    whiskers,
)
from hfkd.report.fidelity_plots import draw_agreement, draw_reliability
from hfkd.report.written import accuracy_pictures

_SMOOTHED_FROM = 60
_WIDEST_WINDOW = 101
_STEEP = 40.0
_ROW, _FIRST_ROW, _TICKS = 15.0, 13.0, 10.5  # points below the axis
_MOST_COLUMNS = 18


def draw_plots(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Draw what a report has figures for, as PNG files that are 1600 pixels wide on white.

    `loss.png` is the loss over the steps, `accuracy.png` the accuracy over the demonstrations, `accuracy-<task>.png`
    that of another task, `reliability.png` how far each model's probabilities can be believed, and `agreement.png`
    where in the answer the student says what its teacher says.

    Args:
        folder: Where the files go, made if need be; each is written whole or not at all.
        report: What `report.json` holds; any part may be missing.

    Returns:
        The files that were written, in the order above; none where there is nothing to draw.
    """
    folder, fidelity = Path(folder), section(report, "fidelity")
    wanted = [("loss.png", draw_loss, [entries(report, "loss_history")])]
    tasks = [("held-out items", details_of(report))]
    tasks += [(f"items of another task, {shown_name(task)}", details) for task, details in other_tasks(report)]
    for name, (what, details) in zip(accuracy_pictures(report), tasks, strict=True):
        wanted.append((name, draw_accuracy, [details, what]))
    wanted += [("reliability.png", draw_reliability, [fidelity]), ("agreement.png", draw_agreement, [fidelity])]
    return [folder / name for name, draw, figures in wanted if draw(folder / name, *figures)]


def draw_comparison(path: Path, runs: Mapping[str, Mapping[str, Mapping[str, Any]]], stage: str = "after") -> bool:
    """Draw the accuracy of several runs in one picture.

    Args:
        path: The PNG.
        runs: `k_shot_details` of each run's report, by the name that it is to have in the picture.
        stage: Whose accuracy.

    Returns:
        Whether there was something to draw.
    """
    return draw_accuracy(path, {name: details.get(stage) or {} for name, details in runs.items()}, "held-out items")


def draw_loss(path: Path, history: Sequence[Mapping[str, Any]]) -> bool:
    """Draw the loss over the steps: all terms, each term before its weight, and the held-out loss.

    Args:
        path: The PNG.
        history: Entries with a `step`, and `loss`, `loss/<term>` or `eval_loss` in nats per token. What is no number
            leaves a gap.

    Returns:
        Whether there was something to draw.
    """
    lines = _loss_lines(history)
    if not lines:
        return False
    longest = max(len(steps) for steps, _ in lines.values())
    window = min(longest // 40 * 2 + 1, _WIDEST_WINDOW) if longest > _SMOOTHED_FROM else 1
    notes = ["each term before its weight"] if "all terms" in lines and len(lines) > 1 else []
    notes += [f"dots as logged, lines the mean of {window} of them"] if window > 1 else []
    with picture(path, 4.6) as figure:
        head(figure, "Loss in training", "; ".join(notes))
        axes = figure.subplots()
        for (name, (steps, values)), look in zip(lines.items(), _looks_of_lines(lines), strict=True):
            _draw_line(axes, steps, values, look, name, window if len(steps) > _SMOOTHED_FROM else 1)
        _loss_scale(axes, [values for _, values in lines.values()])
        axes.set(xlabel="Step", ylabel="Loss (nats per token)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.03)
        if len(lines) > 1:
            handles = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
            foot(figure, handles, 3)
    return True


def _looks_of_lines(lines: Mapping[str, Any]) -> list[Look]:
    """The sum as what is learned is drawn elsewhere too, the held-out loss as what it is compared with."""
    known = {"loss": LOOKS["after"], "all terms": LOOKS["after"], "held out": LOOKS["teacher"]}
    others = looks_of([name for name in lines if name not in known])
    return [known.get(name) or others[name] for name in lines]


def _loss_lines(history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values by the name of the line. A single term is the loss itself and gets no line of its own."""
    entries = sorted((entry for entry in history if math.isfinite(number(entry.get("step")))), key=lambda e: e["step"])
    keys = {key for entry in entries for key in entry if re.fullmatch(r"loss/[^/]+", key)}
    terms = sorted(keys) if len(keys) > 1 or not any("loss" in entry for entry in entries) else []
    wanted = {"loss": "all terms" if terms else "loss", "eval_loss": "held out"}
    lines = {}
    for key in ["loss", *terms, "eval_loss"]:
        points = [(entry["step"], number(entry[key])) for entry in entries if key in entry]
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        if np.isfinite(values).any():
            lines[wanted.get(key) or shown_name(key.removeprefix("loss/"))] = (steps, values)
    return lines


def _draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, look: Look, label: str, window: int) -> None:
    style: dict[str, Any] = {"color": look.colour, "linestyle": look.line, "label": label}
    if window == 1:
        axes.plot(steps, values, marker=look.marker, markersize=4, **style)
        return
    axes.plot(steps, values, ".", color=look.colour, alpha=0.25, markersize=4, markeredgewidth=0)
    axes.plot(steps, _smoothed(values, window), **{**style, "linewidth": 2.2})


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values around each; the first and the last have fewer around, and gaps stay."""
    good, ones = np.isfinite(values), np.ones(window)
    sums = np.convolve(np.where(good, values, 0.0), ones, "same")
    return np.where(good, sums / np.maximum(np.convolve(good, ones, "same"), 1), math.nan)


def _loss_scale(axes: Axes, lines: Sequence[np.ndarray]) -> None:
    """From zero, so that a small fall looks small; in powers of ten where one line would hide the others."""
    found = [values[np.isfinite(values)] for values in lines]
    low, high = min(values.min() for values in found), max(values.max() for values in found)
    if low > 0 and high > _STEEP * min(float(np.median(values)) for values in found):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=12))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif low >= 0:
        axes.set_ylim(0, (high or 1.0) * 1.05)


def draw_accuracy(path: Path, details: Mapping[str, Mapping[str, Mapping[str, Any]]], what: str) -> bool:
    """Draw accuracies over the number of demonstrations, the figures in rows below.

    Args:
        path: The PNG.
        details: By name (`before`, `after`, `gold`, `teacher`, or others) and number of demonstrations, the fields of
            a `ShotResult`.
        what: On what, for the title.

    Returns:
        Whether there was something to draw.
    """
    curves = {name: _curve(section(results)) for name, results in details.items()}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return False
    shots = sorted({count for curve in curves.values() for count in curve})
    results = [result for curve in curves.values() for result in curve.values()]
    items = next((result["items"] for result in results if result.get("items")), None)
    constant = number(
        next((result["most_frequent_share"] for result in results if "most_frequent_share" in result), None)
    )
    with picture(path, 3.8 + _ROW / 72 * (len(curves) + 2)) as figure:
        asked = f"{items} " if items else ""
        note = "lines up and down are 95 % intervals: how far the choice of items alone could move a figure"
        head(figure, f"Accuracy on {asked}{what}", note)
        axes = figure.subplots()
        looks = looks_of(list(curves))
        step = min(0.09, 0.5 / len(curves))
        for place, (name, curve) in enumerate(curves.items()):
            _draw_curve(axes, shots, curve, looks[name], (place - (len(curves) - 1) / 2) * step)
        if math.isfinite(constant):
            axes.axhline(constant, color=WARNING, linestyle=(0, (2, 2)), linewidth=1.4, zorder=1.5)
        percent_axis(axes)
        axes.set_xlim(-0.5, len(shots) - 0.5)
        axes.grid(axis="x", visible=False)
        _draw_rows(axes, shots, curves, looks, constant)
    return True


def _curve(results: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """The results by number of demonstrations, in rising order, those that have an accuracy."""
    found = {int(shots): section(results[shots]) for shots in shots_of({"one": results})}
    return {shots: one for shots, one in found.items() if 0 <= number(one.get("accuracy")) <= 1}


def _draw_curve(
    axes: Axes, shots: Sequence[int], curve: Mapping[int, Mapping[str, Any]], look: Look, offset: float
) -> None:
    places = [shots.index(count) + offset for count in curve]
    heights = [result["accuracy"] for result in curve.values()]
    ends = whiskers(heights, [_interval(result) for result in curve.values()])
    style = {"elinewidth": 1.3, "capsize": 3, "linewidth": 1.5, "markersize": 7, "zorder": 3}
    style |= {"markeredgecolor": "white", "markeredgewidth": 0.7, "clip_on": False}
    axes.errorbar(places, heights, ends, color=look.colour, marker=look.marker, linestyle=look.line, **style)


def _interval(result: Mapping[str, Any]) -> tuple[float, float]:
    """What the report says, or, of one from before intervals were in it, what follows from the items."""
    return pair(result, "interval") or share_interval(result["accuracy"], number(result.get("items")))


def _draw_rows(
    axes: Axes,
    shots: Sequence[int],
    curves: Mapping[str, Mapping[int, Mapping[str, Any]]],
    looks: Mapping[str, Look],
    constant: float,
) -> None:
    """The legend and the figures in one: a row for each curve, each figure below its place on the axis."""
    axes.set_xticks(range(len(shots)), [str(count) for count in shots])
    axes.tick_params(axis="x", length=0, pad=5)
    _row(axes, 0, "demonstrations", None, {}, PALE)
    digits = 1 if len(shots) <= 9 else 0
    for row, (name, curve) in enumerate(curves.items(), start=1):
        cells = {shots.index(count): f"{result['accuracy']:.{digits}%}" for count, result in curve.items()}
        _row(axes, row, shown_name(name), looks[name], cells if len(shots) <= _MOST_COLUMNS else {})
    if math.isfinite(constant):
        last = len(curves) + 1
        always = Look(WARNING, "", "┅")
        _row(axes, last, "most frequent answer", always, {0: f"{constant:.{digits}%}"})


def _row(axes: Axes, row: int, label: str, look: Look | None, cells: Mapping[int, str], colour: str = INK) -> None:
    below = -(_FIRST_ROW + _ROW * row) if row else -_TICKS
    style: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False, "va": "center", "fontsize": 9.5}
    axes.annotate(label, (0, 0), (-24, below), xycoords="axes fraction", ha="right", color=colour, **style)
    if look:
        axes.annotate(
            look.glyph, (0, 0), (-13, below), xycoords="axes fraction", ha="center", color=look.colour, **style
        )
    for place, words in cells.items():
        axes.annotate(
            words, (place, 0), (0, below), xycoords=("data", "axes fraction"), ha="center", color=colour, **style
        )
