"""The pictures of the fidelity: how far probabilities can be believed, and agreement by place in the answer.

Takes plain values, as they are read from a `report.json`; knows nothing of how they were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hfkd.card.reading import count, entries, section
from hfkd.card.teaching import moves
from hfkd.report.drawing import (
    PALE,
    Look,
    foot,
    head,
    key,
    looks_of,
    number,
    percent_axis,
    picture,
    share_interval,
    whiskers,
)

_MOST_LETTERS = 95


def draw_reliability(path: Path, fidelity: Mapping[str, Any]) -> bool:
    """Draw how often each model is right against how sure it was, and how many tokens stand behind each point.

    Args:
        path: The PNG.
        fidelity: By stage, what `FidelityReport.to_dict` gives; the teacher is that of the last stage.

    Returns:
        Whether there was something to draw.
    """
    models = _models(fidelity)
    if not models:
        return False
    looks = looks_of(list(models))
    with picture(path, 6.6) as figure:
        note = "on the line a model is right as often as it says; below it is too sure; up and down: 95 % intervals"
        head(figure, "Reliability: how far the probabilities can be believed", note)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        upper.plot([0, 1], [0, 1], color=PALE, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        width = 0.1 / (len(models) + 1)
        lines = {}
        for place, (name, model) in enumerate(models.items()):
            _draw_model(upper, lower, _bins(model), looks[name], width, place)
            lines[_model_words(name, model)] = key(looks[name])
        percent_axis(upper)
        upper.set(ylabel="How often it is right", xlim=(-0.02, 1.02))
        lower.set(xlabel="How sure it is: the probability of its likeliest token", ylabel="Tokens")
        lower.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        lower.set_xticks([tenth / 10 for tenth in range(11)])
        lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        lower.grid(axis="x", visible=False)
        foot(figure, lines, 1)
    return True


def _models(fidelity: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The student at each stage and the teacher, those that have bins; a teacher that moved at each stage too."""
    stages = {name: section(figures) for name, figures in fidelity.items()}
    models = {name: section(figures, "student") for name, figures in stages.items()}
    moved = moves({}, {"fidelity": fidelity})
    for name, figures in stages.items():
        teacher = f"teacher {name}" if moved else "teacher"
        models[teacher] = section(figures, "teacher") or models.get(teacher, {})
    return {name: model for name, model in models.items() if _bins(model)}


def _bins(model: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    names = ("low", "tokens", "confidence", "accuracy")
    return [
        each for each in entries(model, "reliability") if all(math.isfinite(number(each.get(name))) for name in names)
    ]


def _draw_model(
    upper: Axes, lower: Axes, bins: Sequence[Mapping[str, Any]], look: Look, width: float, place: int
) -> None:
    shares = [each["accuracy"] for each in bins]
    ends = whiskers(shares, [share_interval(each["accuracy"], each["tokens"]) for each in bins])
    style = {"elinewidth": 1.1, "capsize": 2.5, "linewidth": 1.5, "markersize": 6.5, "zorder": 3}
    style |= {"markeredgecolor": "white", "markeredgewidth": 0.7, "clip_on": False}
    sure = [each["confidence"] for each in bins]
    upper.errorbar(sure, shares, ends, color=look.colour, marker=look.marker, linestyle=look.line, **style)
    places = [each["low"] + width * (place + 1) for each in bins]
    lower.bar(places, [each["tokens"] for each in bins], width * 0.9, color=look.colour)


def _model_words(name: str, model: Mapping[str, Any]) -> str:
    words = name if name.startswith("teacher") else f"student {name}"
    error, brier = number(model.get("expected_calibration_error")), number(model.get("brier"))
    words += f": expected calibration error {error:.1%}" if math.isfinite(error) else ""
    return words + (f", Brier score {brier:.3f}" if math.isfinite(brier) else "")


def draw_agreement(path: Path, fidelity: Mapping[str, Any]) -> bool:
    """Draw by place in the answer how often the likeliest token is the teacher's, and how far the student is from it.

    Args:
        path: The PNG.
        fidelity: By stage, what `FidelityReport.to_dict` gives.

    Returns:
        Whether there was something to draw.
    """
    stages = {name: _places(figures) for name, figures in fidelity.items()}
    stages = {name: places for name, places in stages.items() if places}
    if not stages:
        return False
    ranges = sorted({spot for places in stages.values() for spot in places})
    looks = looks_of(list(stages))
    with picture(path, 6.4) as figure:
        note = "bands are 95 % intervals, taken as if the tokens were independent"
        head(figure, "Where in the answer the student says what the teacher says", note)
        shares, distances, counts = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2.4, 0.9))
        for name, places in stages.items():
            _draw_stage(shares, distances, ranges, places, looks[name])
        percent_axis(shares)
        shares.set_ylabel("Same likeliest token")
        distances.set_ylabel("KL from the teacher\n(nats per token)")
        distances.set_ylim(0, max(distances.get_ylim()[1], 1e-3))
        _draw_counts(counts, ranges, stages)
        figure.align_ylabels()
        foot(figure, {f"student {name}": key(looks[name]) for name in stages}, 3)
    return True


def _places(figures: Any) -> dict[tuple[int, int], Mapping[str, Any]]:
    """The figures by first and last place in the answer, counted from 0."""
    found = {(count(each, "first", -1), count(each, "last", -1)): each for each in entries(figures, "by_position")}
    return {spot: each for spot, each in found.items() if spot[0] >= 0 and count(each, "tokens") > 0}


def _draw_stage(
    shares: Axes,
    distances: Axes,
    ranges: Sequence[tuple[int, int]],
    places: Mapping[tuple[int, int], Mapping[str, Any]],
    look: Look,
) -> None:
    """Both lines of one stage; a place without a figure is a gap."""
    found = [places.get(spot) or {} for spot in ranges]
    agreement = [number(each.get("agreement")) for each in found]
    spots = range(len(ranges))
    ends = [share_interval(share, number(each.get("tokens"))) for share, each in zip(agreement, found, strict=True)]
    style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "linestyle": look.line, "markersize": 5}
    style |= {"clip_on": False, "zorder": 3}
    shares.fill_between(
        spots, [low for low, _ in ends], [high for _, high in ends], color=look.colour, alpha=0.16, lw=0
    )
    shares.plot(spots, agreement, **style)
    distances.plot(spots, [number(each.get("forward_kl")) for each in found], **style)


def _draw_counts(
    axes: Axes, ranges: Sequence[tuple[int, int]], stages: Mapping[str, Mapping[tuple[int, int], Mapping[str, Any]]]
) -> None:
    """How many tokens stand behind each place: few of them say little."""
    found = [max(places[spot]["tokens"] for places in stages.values() if spot in places) for spot in ranges]
    axes.bar(range(len(ranges)), found, 0.7, color=PALE)
    axes.set(xlabel="Place in the answer (token)", ylabel="Tokens", xlim=(-0.6, len(ranges) - 0.4))
    names = [f"{first + 1}" if first == last else f"{first + 1}–{last + 1}" for first, last in ranges]
    often = -(-len(ranges) * (max(map(len, names)) + 1) // _MOST_LETTERS)  # so that no two of them touch
    axes.set_xticks(range(0, len(ranges), often), names[::often])
    axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    axes.grid(axis="x", visible=False)
