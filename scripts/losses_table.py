"""The table of all losses in docs/losses.md: `python scripts/losses_table.py` renews it, `--check` only compares.

What a loss punishes, its formula, unit, cost and paper are read from its docstring, what it asks for from its
attributes; whether it is 0 at equality, how large it gets and what it reads of a sparse teacher are measured by
running it on made-up rows. Nothing about a single loss is written down here.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from written_page import write_or_compare

from hfkd.losses import LOSSES, STATE_LOSSES, StateLoss, StateRows, TokenLoss
from hfkd.losses.base import docstring_section
from hfkd.rows import Head, RowLayout, TopKRows
from hfkd.support import TokenChunk

PAGE = Path(__file__).resolve().parent.parent / "docs" / "losses.md"
COMMAND = "python scripts/losses_table.py"
BEGIN = f"<!-- losses: written by `{COMMAND}`, not by hand -->"
END = "<!-- losses: end -->"
HEADER = ("key", "punishes", "needs", "0 at equality", "unit; bound", "cost", "reads of top-k rows", "alone", "paper")
IDS = 24
"""Size of the vocabulary that losses are tried on."""

Loss = TokenLoss | StateLoss


def main(arguments: list[str]) -> int:
    """Write the table, or with `--check` say whether it is up to date."""
    return write_or_compare(PAGE, renewed, COMMAND, arguments)


def renewed(page: str) -> str:
    """The page with the table as it should be now."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def table() -> str:
    """One row for each loss, in the order of `LOSSES` and `STATE_LOSSES`."""
    torch.manual_seed(0)  # losses make random weights
    rows = [HEADER, ("---",) * len(HEADER)]
    rows += [row(cls) for cls in chain(LOSSES.values(), STATE_LOSSES.values())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(cls: type[Loss]) -> tuple[str, ...]:
    """The cells of a loss."""
    cells = (_punishes(cls), _needs(cls), _with_options(cls, _is_zero), _unit_and_bound(cls), _cost(cls))
    cells += (_sparse(cls), _with_options(cls, lambda loss: loss.may_stand_alone), _paper(cls))
    return f"`{cls.key}`", *(cell.replace("|", r"\|") for cell in cells)


# --- read from the class


def _punishes(cls: type[Loss]) -> str:
    first = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()).removeprefix("Punishes ").rstrip(".")
    formula = _up_to(docstring_section(cls, "Formula").removeprefix("For row i: "), ",")
    formula = re.split(r" = | for ", formula)[0]
    return first if "`" in formula else f"{first}: `{formula}`"


def _up_to(text: str, mark: str) -> str:
    """The text up to a mark, or to the end of its sentence, outside brackets."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        depth += bool(re.match(r"<\w", text[place:])) - bool(re.search(r"\S>$", text[: place + 1]))
        if depth == 0 and (letter == mark or text[place : place + 2] in (". ", "; ", ": ")):
            return text[:place]
    return text.rstrip(".")


def _needs(cls: type[Loss]) -> str:
    found = [f"teacher's {need}" for need in sorted(cls.needs)]
    if issubclass(cls, TokenLoss):
        if cls.groups is not TokenLoss.groups:
            found.append("other rows")
        if cls.auxiliary:
            found.append("student's last states")
    else:
        if _sees_other_rows(cls):
            found.append("other rows")
        if _refuses(cls, lambda rows: replace(rows, teacher_head=None)):
            found.append("teacher's head")
    if _reads_targets(cls):
        found.append("the text's token")
    return ", ".join(found)


def _cost(cls: type[Loss]) -> str:
    return _up_to(docstring_section(cls, "Cost"), ":").replace("**", "^")


def _paper(cls: type[Loss]) -> str:
    text = docstring_section(cls, "Paper")
    links = re.findall(r"https?://[^\s,;)]+[^\s,;.)]", text)
    shown = [f"[{link.rsplit('/', 1)[1] if 'arxiv' in link else 'doi'}]({link})" for link in links]
    return (", ".join(shown) or "none") + (" \\*" if re.search(r"\bours\b", text) else "")


def _unit_and_bound(cls: type[Loss]) -> str:
    sections = [docstring_section(cls, name) for name in ("Cost", "Undefined", "Args")]
    sentences = [one.rstrip(".") for text in sections for one in re.split(r"(?<=\.)\s+", text)]
    about = [one for one in sentences if re.search(r"(not|n't|^in)( in)? nats|^nats of", one, re.IGNORECASE)]
    unit = about[0].split("Off by default: ")[-1] if about else "nats"
    unit = unit[0].lower() + unit[1:]
    if re.search(r"between \d and \d|negative", unit):
        return unit
    said = " ".join([*(inspect.getdoc(cls) or "").split("Formula:")[0].split(), *sections[1].split()])
    stated = re.findall(r"never above [^,.;:]+", said)
    return f"{unit}; {stated[0] if stated else _bound(cls)}"


# --- measured


def _with_options(cls: type[Loss], holds: Callable[[Loss], bool]) -> str:
    """Whether something holds of a loss with its defaults, or else with a switch of its own turned on."""
    if holds(cls()):
        return "yes"
    switches = [name for name, one in inspect.signature(cls).parameters.items() if one.default is False]
    found = [f"`{name}`" for name in switches if holds(cls(**{name: True}))]
    return f"only with {' or '.join(found)}" if found else "no"


def _is_zero(loss: Loss) -> bool:
    """Whether it costs nothing where both agree, on rows of which some are alike and some are not."""
    if isinstance(loss, StateLoss):
        values = _of_states(loss, lambda rows: replace(rows, student=rows.teacher))
    else:
        logits = 2 * torch.randn(6, IDS, dtype=torch.float64, generator=_seeded()).repeat(2, 1)
        values = loss(TokenChunk(logits.argmin(dim=-1), logits, logits.clone())).detach()
    return float(values.abs().max()) < 1e-6


def _bound(cls: type[Loss]) -> str:
    """Whether it grows without limit as student and teacher disagree more and more."""
    if issubclass(cls, StateLoss):
        small, large = (_of_states(cls(), _far(size)).max() for size in (1e3, 1e6))
    else:
        small, large = (_apart(cls, IDS, gap) for gap in (100.0, 1000.0))
    if large > 1.5 * small:
        return "no bound"
    if abs(_apart(cls, 16 * IDS, 1000.0) - large) > 1e-3 * large:
        return "a bound that grows with the vocabulary"
    return f"{float(large):.3g} where each is sure of another token"


def _apart(cls: type[TokenLoss], ids: int, gap: float) -> float:
    """The most that it costs when student and teacher have logits of this size and never agree: each is sure of one
    token, or puts all tokens into the other's order from behind.
    """
    one = torch.zeros(4, ids, dtype=torch.float64)
    one[:, 0] = gap
    order = (torch.arange(ids, dtype=torch.float64) * gap).expand(4, ids)
    chunks = [
        TokenChunk(torch.full((4,), target), student, student.flip(-1))
        for student in (one, order)
        for target in (0, ids - 1)
    ]
    return float(torch.stack([cls()(chunk).detach() for chunk in chunks]).max())


_LISTED = "the listed ids only"


class _Recorded(TokenChunk):
    """A chunk that knows which of its methods were called."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.called: set[str] = set()

    def log_probs(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.called.add("a tail bucket")
        return super().log_probs(*args)

    def top_log_probs(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.called.add("a tail bucket")
        return super().top_log_probs(*args)

    def shared_log_probs(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.called.add("the likeliest ids of all its rows")
        return super().shared_log_probs(*args)

    def logits(self) -> tuple[Tensor, Tensor]:
        self.called.add(_LISTED)
        return super().logits()


def _sparse(cls: type[Loss]) -> str:
    """How it takes a teacher that gives the likeliest ids only."""
    if issubclass(cls, StateLoss):
        return "nothing"
    generator = _seeded()
    student, teacher = torch.randn(2, 4, IDS, dtype=torch.float64, generator=generator)
    loss = cls()
    temperature = getattr(loss, "temperature", 1.0)
    log_probs, ids = torch.log_softmax(teacher / temperature, dim=-1).topk(6, dim=-1)
    chunk = _Recorded(ids[:, 1], student, TopKRows(ids, log_probs, IDS, temperature))
    values = loss(chunk)
    if not torch.isfinite(values).all():
        raise ValueError(f"{cls.key} isn't finite on sparse rows: {values}")
    read = chunk.called - {_LISTED} or chunk.called  # whoever reads distributions may look at the list besides
    return " and ".join(sorted(read)) or "nothing"


def _reads_targets(cls: type[Loss]) -> bool:
    """Whether the text's own tokens matter."""
    loss = cls()
    values = []
    for target in (0, 1):
        targets = torch.full((6,), target)
        if isinstance(loss, StateLoss):
            values.append(_of_states(loss, lambda rows, targets=targets: replace(rows, targets=targets)))
            continue
        student, teacher = 2 * torch.randn(2, 6, IDS, dtype=torch.float64, generator=_seeded())
        values.append(loss(TokenChunk(targets, student, teacher)).detach())
    return bool((values[0] - values[1]).abs().max() > 1e-9)


def _sees_other_rows(cls: type[StateLoss]) -> bool:
    """Whether what a row costs depends on another row's states."""

    def change(rows: StateRows) -> StateRows:
        return replace(
            rows, student={layer: torch.cat([-state[:1], state[1:]]) for layer, state in rows.student.items()}
        )

    before, after = (_of_states(cls(), how)[1:] for how in (lambda rows: rows, change))
    return bool((before - after).abs().max() > 1e-9)


def _refuses(cls: type[StateLoss], change: Callable[[StateRows], StateRows]) -> bool:
    try:
        _of_states(cls(), change)
    except ValueError:
        return True
    return False


def _far(size: float) -> Callable[[StateRows], StateRows]:
    """States that point to the other side, many times as far."""
    return lambda rows: replace(rows, student={layer: -size * state for layer, state in rows.teacher.items()})


def _of_states(loss: StateLoss, change: Callable[[StateRows], StateRows]) -> Tensor:
    """[6] what it says of rows that were changed; both models have two blocks of the same width."""
    generator = _seeded()
    student, teacher = (
        {layer: torch.randn(6, 8, dtype=torch.float64, generator=generator) for layer in range(3)} for _ in range(2)
    )
    head = Head(torch.randn(IDS, 8, dtype=torch.float64, generator=generator))
    layout = RowLayout.single(6, torch.device("cpu"))
    loss.prepare(student_layers=2, teacher_layers=2, student_width=8, teacher_width=8)
    return loss(change(StateRows(student, teacher, layout, torch.arange(6), head))).detach()


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
