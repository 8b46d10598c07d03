"""docs/scaling.md: its tables are those that the arithmetic gives, and the files and settings that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hfkd.recipe.schema import TeacherSection

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """scripts/memory_table.py."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return __import__("memory_table")


def page() -> str:
    return (ROOT / "docs/scaling.md").read_text("utf-8")


def test_tables_are_the_arithmetics(script) -> None:
    """Figures of an older formula send a run to devices that it doesn't fit."""
    assert script.renewed(page()) == page(), f"run {script.COMMAND}"
    altered = page().replace("| 70B |", "| 71B |", 1)
    assert altered != page() and script.renewed(altered) == page()


def test_check_tells_an_old_page(script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A check that always passes would let the page age."""
    monkeypatch.setattr(script, "PAGE", tmp_path / "scaling.md")
    script.PAGE.write_text(page().replace("| 70B |", "| 71B |", 1), "utf-8")
    assert script.main(["--check"]) == 1
    assert script.main([]) == 0
    assert script.main(["--check"]) == 0 and script.PAGE.read_text("utf-8") == page()


def test_what_it_names_exists() -> None:
    """A command or a setting that isn't there is tried by the first reader."""
    for name in set(re.findall(r"\]\(([^)#]+)\)", page())):
        assert (ROOT / "docs" / name).exists(), name
    for name in set(re.findall(r"recipes/accelerate/\w+\.yaml", page())):
        assert (ROOT / name).exists(), name
    assert "offload: true" in page() and "offload" in TeacherSection.model_fields
    assert len(page().splitlines()) <= 200
