"""docs/papers.md names every paper that the code names, and nothing that isn't there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hfkd.losses import LOSSES, STATE_LOSSES
from hfkd.revision import REVISERS
from hfkd.sampling import SAMPLERS
from hfkd.transforms import TRANSFORMS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/papers.md").read_text("utf-8")
ARXIV = re.compile(r"arxiv\.org/abs/(\d{4}\.\d{4,5})")
# Named for a tool of measuring or a remark, not for a method that is implemented.
ASIDE = {"2402.03300", "1706.04599", "1802.08232", "2411.07191", "2505.15442"}


def test_every_paper_of_the_code_is_on_the_page() -> None:
    """A method whose origin stands in a docstring alone can't be found by those who look for the paper."""
    named: dict[str, str] = {}
    for path in sorted((ROOT / "hfkd").rglob("*.py")):
        for number in ARXIV.findall(path.read_text("utf-8")):
            named.setdefault(number, path.relative_to(ROOT).as_posix())
    missing = {number: where for number, where in named.items() if number not in PAGE and number not in ASIDE}
    assert len(named) > 30 and not missing


@pytest.mark.parametrize("name", sorted([*LOSSES, *STATE_LOSSES, *SAMPLERS, *REVISERS, *TRANSFORMS]))
def test_every_method_is_on_the_page(name: str) -> None:
    """What a recipe can switch on must be found under its key."""
    assert f"`{name}`" in PAGE


def test_what_the_page_names_is_there() -> None:
    """A path that was moved sends a reader nowhere."""
    code = set(re.findall(r"`([a-z_/]+/[a-z_]+\.py|[a-z_]+\.py)`", PAGE))
    lacking = [name for name in code if not (ROOT / "hfkd" / name).exists() and not (ROOT / name).exists()]
    links = re.findall(r"\]\((?!http)([^)#]+)", PAGE)
    lacking += [link for link in links if not (ROOT / "docs" / link).exists()]
    recipes = re.findall(r"`([a-z_]+/[a-z_]+\.yaml)`", PAGE)
    lacking += [name for name in recipes if not (ROOT / "recipes" / name).exists()]
    assert len(code) > 10 and recipes and not lacking


def test_tables_have_six_columns() -> None:
    """A row with a bar too few is shown with its cells in the wrong columns."""
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    wide = [line for line in rows if line.count("|") - line.count("\\|") == 7]
    assert len(wide) > 30
    for header in (line for line in rows if line.startswith("| paper")):
        assert header in wide
