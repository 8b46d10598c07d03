"""Markdown out of words that may hold anything: names of models, answers, tokens.

What isn't `Markdown` is escaped when a template prints it, so that no value can end a table, open a link or bring HTML
along.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_LONGEST = 300


class Markdown(str):
    """A text that is Markdown already."""

    __slots__ = ()


def one_line(words: object, longest: int = _LONGEST) -> str:
    """Words in one line: control characters and runs of blanks are one blank each, what is too long is cut."""
    line = " ".join("".join(one if one.isprintable() else " " for one in str(words)).split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def plain(words: object) -> Markdown:
    """Words that are read as they stand."""
    return words if isinstance(words, Markdown) else _escaped(one_line(words, 2000))


def _escaped(line: str) -> Markdown:
    return Markdown(html.escape(_SPECIAL.sub(r"\\\1", line), quote=False))


def code_cell(words: object) -> Markdown:
    """Words as inline code in a table; with a bar in them as plain words, since it would end the cell in code too."""
    return plain(words) if "|" in str(words) else code(words)


def code(words: object) -> Markdown:
    """Words as inline code, anywhere but in a table."""
    line = one_line(words, 1000)
    if not line:
        return Markdown("(empty)")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", line)), default=0) + 1)
    gap = " " if line.startswith("`") or line.endswith("`") else ""
    return Markdown(f"{fence}{gap}{line}{gap}{fence}")


def block(lines: str, language: str = "") -> Markdown:
    """Lines as a block of code, with a fence that none of them can close."""
    longest = max((len(run) for run in re.findall(r"`{3,}", lines)), default=2)
    fence = "`" * (longest + 1)
    return Markdown(f"{fence}{language}\n{lines.rstrip()}\n{fence}")


def table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> Markdown:
    """A table; nothing where it would have no row."""
    written = [_row(row) for row in rows]
    return Markdown("\n".join([_row(heads), "|" + "---|" * len(heads), *written]) if written else "")


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(plain(cell) for cell in cells)} |"


def bullets(lines: Iterable[object]) -> Markdown:
    """A list, one line each."""
    return Markdown("\n".join(f"- {plain(line)}" for line in lines))


def joined(parts: Iterable[object], between: str = " ") -> Markdown:
    """Pieces of Markdown or words as one; empty ones are left out."""
    return Markdown(between.join(plain(part) for part in parts if part))
