"""One look for all pictures: colours and signs by name, a figure of its own, and a PNG that is whole or not there.

Knows nothing of what is drawn. No pyplot: no window system, no figure that stays open, and nobody's settings change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hfkd.card.results import STAGES
from hfkd.files import write_whole
from hfkd.intervals import wilson_interval

INK, PALE, GRID, WARNING = "#24292f", "#57606a", "#e4e7eb", "#c44601"
_WIDTH, _PIXELS_PER_INCH = 8.0, 200
_LONGEST = 28
_STYLE = {
    "text.color": INK,
    "text.parse_math": False,  # names come from recipes and rows: a dollar sign is a dollar sign
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Look:
    """How one thing is drawn; colour and sign both tell it apart, on paper without colours too.

    Attributes:
        colour: Of the palette of Okabe and Ito, whose colours are different ones to colour-blind eyes too.
        marker: As matplotlib names it.
        glyph: The same sign as a letter.
        line: Style of lines.
    """

    colour: str
    marker: str
    glyph: str
    line: str | tuple[int, tuple[float, ...]] = "-"


_DASHED, _DOTTED, _MIXED = (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5))
LOOKS = {
    "before": Look("#7f868d", "o", "●", _DASHED),
    "after": Look("#0072b2", "s", "■"),
    "gold": Look("#e69f00", "D", "◆", _MIXED),
    "teacher": Look("#111111", "^", "▲", _DOTTED),
}
_MORE_LOOKS = (
    Look("#009e73", "v", "▼"),
    Look("#cc79a7", "P", "✚", _DASHED),
    Look("#d55e00", "X", "✖", _MIXED),
    Look("#56b4e9", "<", "◀", _DOTTED),
    Look("#8b6f00", ">", "▶", _DASHED),
    Look("#0072b2", "p", "⬟", _DOTTED),
    Look("#e69f00", "h", "⬢"),
)


def looks_of(names: Sequence[str]) -> dict[str, Look]:
    """A look for each name: known ones have their own, the others take the next one."""
    others = (_MORE_LOOKS[place % len(_MORE_LOOKS)] for place in range(len(names)))
    return {name: LOOKS.get(name) or next(others) for name in names}


def shown_name(name: str) -> str:
    """A name for a reader, in one line that isn't too long; a leading underscore would hide it from a legend."""
    words = " ".join(str(STAGES.get(name, name)).split()).lstrip("_")
    words = "".join(letter if letter.isprintable() else "?" for letter in words) or "?"
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 1]}…"


@contextmanager
def picture(path: Path, height: float) -> Iterator[Figure]:
    """A figure to draw on, 1600 pixels wide; it is written when the block ends without an error. The user's own style,
    a dark one perhaps, has no part in it and comes back afterwards.

    Args:
        path: The PNG.
        height: In inches, at a width of 8.
    """
    with rc_context():
        rcdefaults()
        rcParams.update(_STYLE)
        figure = Figure(figsize=(_WIDTH, height), dpi=_PIXELS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, hspace=0.04)
        yield figure
        write_whole(path, lambda stream: figure.savefig(stream, format="png", metadata={"Software": None}))


def head(figure: Figure, title: str, note: str = "") -> None:
    """The title at the left, and how to read the picture in a smaller line below."""
    figure.suptitle(f"{title}\n" if note else title, x=0.015, ha="left", fontsize=12, fontweight="bold")
    if note:
        figure.text(0.015, 1 - 0.38 / figure.get_figheight(), note, va="top", fontsize=9.5, color=PALE)


def foot(figure: Figure, lines: Mapping[str, Any], columns: int = 2) -> None:
    """The legend below everything, where it covers no point."""
    figure.legend(list(lines.values()), list(lines), loc="outside lower left", ncols=columns, handlelength=2.6)


def key(look: Look) -> Line2D:
    """A line with its sign, for a legend."""
    return Line2D([], [], color=look.colour, linestyle=look.line, marker=look.marker, markersize=6)


def number(value: Any) -> float:
    """A finite number as it is, anything else as NaN, which leaves a gap."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else math.nan


def whiskers(values: Sequence[float], intervals: Sequence[tuple[float, float]]) -> list[list[float]]:
    """How far each interval reaches below and above its value, [2, points]; nothing where an end isn't known."""
    pairs = list(zip(values, intervals, strict=True))
    ends = [[value - number(low) for value, (low, _) in pairs], [number(high) - value for value, (_, high) in pairs]]
    return [[max(length, 0.0) if math.isfinite(length) else 0.0 for length in row] for row in ends]


def percent_axis(axes: Axes, low: float = 0.0) -> None:
    """Shares as per cent on the upright axis, with room above for what stands at 100 %."""
    axes.set_ylim(low, 1 + 0.04 * (1 - low))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def share_interval(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share of so many independent cases; NaN where there are none."""
    if not (0 <= share <= 1 and count >= 1):
        return math.nan, math.nan
    return wilson_interval(round(share * count), round(count))
