"""docs/losses.md: its table is the one that the code gives, and what it says of each loss is so."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from hfkd.losses import LOSSES, STATE_LOSSES, Divergence, TokenLoss
from hfkd.losses.base import docstring_section
from hfkd.support import TokenChunk

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """scripts/losses_table.py."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return __import__("losses_table")


def page() -> str:
    return (ROOT / "docs/losses.md").read_text("utf-8")


def rows() -> dict[str, list[str]]:
    """The cells behind each key."""
    table = page().split("<!-- losses: written")[1].split("<!-- losses: end")[0]
    lines = [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in table.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells[1:] for cells in lines}


def test_the_page_is_up_to_date(script):
    """A table that was written once describes the losses of that day."""
    assert script.renewed(page()) == page(), f"docs/losses.md is out of date; renew it with: {script.COMMAND}"


def test_renewing_replaces_the_table_alone(script):
    """A command that renews a page must not eat what stands around its table."""
    before, after = "# Losses\n\nprose\n", "\n\nmore prose\n"
    found = script.renewed(f"{before}{script.BEGIN}\nold\n{script.END}{after}")
    assert found.startswith(before) and found.endswith(after) and "\nold\n" not in found
    assert script.renewed(found) == found


def test_every_loss_has_a_row_without_a_gap():
    """A loss that isn't in the table is not found, and an empty cell means that the docstring wasn't understood."""
    assert list(rows()) == [*LOSSES, *STATE_LOSSES]
    for kind, cells in rows().items():
        assert len(cells) == 8 and all(cell.strip() for cell in cells), kind
        punishes = cells[0]
        assert punishes.count("`") % 2 == 0 and all(punishes.count(a) == punishes.count(b) for a, b in ("()", "[]"))
        link = re.search(r"https?://[^\s,;)]+[^\s,;.)]", docstring_section({**LOSSES, **STATE_LOSSES}[kind], "Paper"))
        assert (link[0] if link else "none") in cells[-1]


@pytest.mark.parametrize("kind", LOSSES)
def test_zero_and_bound_are_so(kind):
    """Whoever sets a threshold reads in the table whether the loss ever becomes 0 and how large it gets. Measured here
    by other means than the script's.
    """
    _, needs, zero, unit, _, sparse, alone, _ = rows()[kind]

    def value(student: list[list[float]], teacher: list[list[float]], target: int = 0, **options) -> float:
        chunk = TokenChunk.from_logits(
            torch.full((len(student),), target), torch.tensor(student), torch.tensor(teacher)
        )
        return float(LOSSES[kind](**options)(chunk).detach().abs().max())

    near = [[2.0, 1.0, 0.0], [2.0, 1.0, 0.5]]
    assert (value(near, near) < 1e-6) == (zero == "yes")
    if zero.startswith("only with"):
        assert value(near, near, **{zero.split("`")[1]: True}) < 1e-5
    apart = [
        value([one] * 2, [other] * 2, target)
        for one, other in ([[0.0, 80.0, 0.0], [80.0, 0.0, 0.0]], [[160.0, 80.0, 0.0], [0.0, 80.0, 160.0]])
        for target in (0, 2)
    ]
    limits = {"log 2": math.log(2), "-log(skew)": -math.log(0.1), "between 0 and 1": 1, "between 0 and 2": 2}
    limit = next((number for words, number in limits.items() if words in unit), math.inf)
    if found := re.search(r"([\d.]+) where each is sure", unit):
        limit = float(found[1])
    if "no bound" in unit:
        assert max(apart) > 25
    elif limit < math.inf:
        assert max(apart) == pytest.approx(limit, rel=1e-3)
    else:
        assert "grows with the vocabulary" in unit and max(apart) < 25
    assert ("teacher" in needs) == bool(LOSSES[kind].needs) == (sparse != "nothing")
    assert (alone == "yes") == LOSSES[kind]().may_stand_alone
    assert issubclass(LOSSES[kind], Divergence) == (kind not in ("cross_entropy", "embedding_neighbours"))
    assert ("other rows" in needs) == (LOSSES[kind].groups is not TokenLoss.groups)
