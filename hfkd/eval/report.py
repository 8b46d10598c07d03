"""What a run leaves for people: its report as JSON, and one picture of its loss and its accuracy.

Knows nothing of models or of how the figures were made; it takes them as plain values.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

_COLOURS = {"before": "#9aa5b1", "after": "#0b6e99", "gold": "#d9a441"}
_MORE_COLOURS = ("#6a4c93", "#4f9d69", "#c8553d", "#7d8597")
_LABELS = {"gold": "fine-tuned on gold labels"}
_INK = "#3b4148"
_HALO = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON, whole or not at all: nobody reads half of one, and a failure keeps the one before.

    Args:
        path: The file; its folder is made if need be.
        report: JSON values.

    Raises:
        TypeError: The report holds something that is no JSON value.
        ValueError: The report holds NaN or infinity, which JSON has no word for.
    """
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    _write_whole(Path(path), lambda stream: stream.write(text.encode("utf-8")))


def plot_run(
    path: Path, loss_history: Sequence[Mapping[str, float]], k_shot: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> None:
    """Draw the loss over the steps beside the k-shot accuracies, as a PNG.

    Args:
        path: The PNG; written whole or not at all.
        loss_history: Entries with `step` and `loss` (nats per token); further keys that begin with `loss/` are terms
            of the loss and get lines of their own. Other keys, and entries without a loss, are passed over.
        k_shot: By name (`before`, `after`, `gold`, or others), what `KShotReport.to_dict` returns.

    Raises:
        ValueError: There is nothing to draw.
    """
    history = [entry for entry in loss_history if "step" in entry and "loss" in entry]
    reports = {name: results for name, results in k_shot.items() if results}
    if not history and not reports:
        raise ValueError("There is nothing to draw: no logged loss and no accuracy. Expected at least one of them.")
    widths = [width for width, wanted in ((5.4, history), (6.4, reports)) if wanted]
    # A figure of its own, with the Agg canvas: no window system, and nobody's pyplot state is touched.
    figure = Figure(figsize=(sum(widths), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    panels = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    if history:
        _draw_loss(panels.pop(0), history)
    if reports:
        _draw_accuracy(panels.pop(0), reports)
    _write_whole(Path(path), lambda stream: figure.savefig(stream, format="png", dpi=150))


def _draw_loss(axes: Axes, history: Sequence[Mapping[str, float]]) -> None:
    names = sorted({name for entry in history for name in entry if name.startswith("loss/")})
    if len(names) == 1:  # one term is the loss itself
        names = []
    marker = "o" if len(history) <= 40 else None
    for name, colour in zip(["loss", *names], [_COLOURS["after"], *_cycle(len(names))], strict=True):
        points = [(entry["step"], entry[name]) for entry in history if math.isfinite(entry.get(name, math.nan))]
        whole = name == "loss"
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color=colour,
            linewidth=2 if whole else 1.3,
            linestyle="-" if whole else "--",
            marker=marker if whole else None,
            markersize=3.5,
            label="all terms" if whole else name.removeprefix("loss/"),
        )
    axes.set(title="Training loss", xlabel="Step", ylabel="Loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(*_limits(axes))
    if names:
        axes.legend(frameon=False, fontsize=9)
    _plain(axes)


def _draw_accuracy(axes: Axes, reports: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    shots = sorted({int(count) for results in reports.values() for count in results})
    width = min(0.8 / len(reports), 0.5)
    others = iter(_cycle(len(reports)))
    for place, (name, results) in enumerate(reports.items()):
        offset = (place - (len(reports) - 1) / 2) * width
        shown = [(shots.index(int(count)) + offset, result) for count, result in results.items()]
        _draw_bars(axes, shown, width * 0.92, _COLOURS.get(name) or next(others), _LABELS.get(name, name))
    handles: list[Any] = [container for container in axes.containers if isinstance(container, BarContainer)]
    first = next(iter(next(iter(reports.values())).values()))
    constant = first.get("most_frequent_share")
    if constant is not None:
        label = f"always the most frequent answer ({constant:.1%})"
        handles.append(axes.axhline(constant, color="#c0392b", linestyle="--", linewidth=1.2, label=label))
    asked = f"{first['items']} " if "items" in first else ""
    axes.set(title=f"Accuracy on {asked}held-out items", xlabel="Demonstrations in the prompt", ylim=(0, 1.1))
    axes.set_ylabel("Accuracy (± 1 standard error)")
    axes.set_xticks(range(len(shots)), [str(count) for count in shots])
    axes.set_xlim(-0.55, len(shots) - 0.45)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(handles=handles, frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    _plain(axes)


def _draw_bars(
    axes: Axes, shown: list[tuple[float, Mapping[str, Any]]], width: float, colour: str, label: str
) -> None:
    """The bars of one report; an error bar ends at 0, because no accuracy lies below it."""
    heights = [result["accuracy"] for _, result in shown]
    errors = [result.get("standard_error", 0.0) for _, result in shown]
    below = [min(error, height) for error, height in zip(errors, heights, strict=True)]
    whiskers = {"ecolor": _INK, "elinewidth": 1, "capsize": 2.5}
    centres = [centre for centre, _ in shown]
    axes.bar(centres, heights, width, yerr=[below, errors], color=colour, error_kw=whiskers, label=label)
    for centre, height, error in zip(centres, heights, errors, strict=True):
        place = (centre, height + error + 0.012)
        axes.annotate(f"{height:.0%}", place, ha="center", va="bottom", fontsize=8, color=_INK, bbox=_HALO)


def _limits(axes: Axes) -> tuple[float, float]:
    """From zero where all values are positive, so that a small fall doesn't look like a large one."""
    low, high = axes.get_ylim()
    return (0.0, high) if axes.dataLim.y0 >= 0 else (low, high)


def _cycle(count: int) -> list[str]:
    return [_MORE_COLOURS[place % len(_MORE_COLOURS)] for place in range(count)]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.title.set(fontsize=11, color=_INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=10, color=_INK)


def _write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a neighbour of the file first, and put it in the file's place when it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
