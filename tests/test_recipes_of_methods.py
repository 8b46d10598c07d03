"""The recipes of the methods: each one loads, names files that are there, and says how it is run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hfkd.recipe import expand, load_recipe
from hfkd.run.build import build

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("which_data", "which_tokens", "whose_text", "self_knowledge", "kd_rl", "lorid", "black_box")
PLANS = {"label.yaml"}  # of `hfkd label`, no recipe
MADE = {"student.yaml"}  # reads what another command writes
RECIPES = [
    path for folder in FOLDERS for path in sorted((ROOT / "recipes" / folder).glob("*.yaml")) if path.name not in PLANS
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_it_builds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that was renamed, or a file that is named wrongly by a letter, would show on the reader's machine."""
    monkeypatch.chdir(ROOT)
    for one in expand(load_recipe(path)).values():
        built = build(one, dry=True)
        assert built.objective.terms
        for source in built.sources.values():
            if source.path.endswith((".jsonl", ".yaml")) and path.name not in MADE:
                assert Path(source.path).is_file(), source.path


def test_they_say_how_to_run_them_and_write_to_folders_of_their_own() -> None:
    """Two recipes with one output folder would refuse, or overwrite, each other's run."""
    folders = []
    for path in RECIPES:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# "), path
        assert f"recipes/{path.parent.name}/{path.name}" in text, path
        folders.append((yaml.safe_load(text).get("training") or {}).get("output_dir", f"outputs/{path.stem}"))
    assert len(RECIPES) >= 14 and len(set(folders)) == len(folders)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_recipe_is_in_the_page_of_its_folder(folder: str) -> None:
    """A recipe that no page speaks of has no paper, no traps and no result."""
    page = (ROOT / "recipes" / folder / "README.md").read_text("utf-8")
    assert "arxiv.org/abs/" in page
    for path in (ROOT / "recipes" / folder).glob("*.yaml"):
        assert path.name in page


def test_no_page_waits_for_its_words() -> None:
    """A placeholder that is published says that nobody read the page."""
    pages = [*(ROOT / "recipes").rglob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    for page in pages:
        for word in ("RESULTS", "TODO", "ROWS HERE"):
            assert word not in page.read_text("utf-8"), f"{page}: {word}"
