"""The walkthrough: every cell runs, with tiny models in the place of the one that it names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import make_model, make_tokenizer

from hfkd.masking import mask_text

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = json.loads((ROOT / "docs/walkthrough.ipynb").read_text("utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> list:
    """What IPython would show; IPython itself isn't needed."""
    shown: list = []
    module = ModuleType("IPython.display")
    module.Image = lambda path, **_: Path(path)
    module.display = shown.append
    package = ModuleType("IPython")
    package.version_info, package.get_ipython = (9, 0), lambda: None  # what matplotlib asks it
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_the_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, display: list) -> None:
    """An example that no longer runs is the first thing that a newcomer sees fail."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    folder = Path("outputs/models/SmolLM2-135M-Instruct")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(CELLS):
        code = "".join(cell["source"]).replace("max_steps=30", "max_steps=2")
        exec(compile(code, f"cell {number}", "exec"), names)  # noqa: S102
    assert names["near"].forward_kl != names["apart"].forward_kl
    assert [path.name for path in display] == [path.name for path in names["pictures"]] and display
    assert Path("outputs/walkthrough/adapter_model.safetensors").is_file()


def test_it_holds_what_it_printed() -> None:
    """Cells without output, or out of order, are no example of anything."""
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = json.dumps([cell["outputs"] for cell in CELLS])
    assert "image/png" in outputs and "After" in outputs
    assert '"output_type": "error"' not in outputs
    assert mask_text(outputs) == outputs, "no path and no name of the machine that ran it"
