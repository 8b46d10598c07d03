"""Cards out of folders: whole ones, old ones, damaged ones and empty ones, and `hfkd card`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from card_rules import faults, metadata_of
from reports import whole_report, whole_run
from typer.testing import CliRunner

from hfkd.card import CardError, card_of_folder, is_untouched, write_card
from hfkd.cli.main import app

ADAPTER = {"base_model_name_or_path": "org/small", "peft_type": "LORA", "r": 8, "lora_alpha": 16}
FILES = ("run.json", "report.json", "recipe.yaml", "adapter_config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with all that a run leaves, its weights as empty files."""
    run = {**whole_run(), "status": "finished"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "report.json").write_text(json.dumps(whole_report()))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(run["recipe"]))
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("adapter_model.safetensors", "tokenizer_config.json"):
        (tmp_path / name).touch()
    return tmp_path


def test_a_whole_folder_lacks_nothing(folder: Path) -> None:
    """A list of what is missing that is never empty is one that nobody reads."""
    text, missing = card_of_folder(folder)
    assert missing == []
    assert "could not say" not in text and "](plots/loss.png)" in text
    assert not faults(text)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [None, "", "{", "[1, 2]", '"words"', "\x00", "[" * 100_000])
def test_a_lost_or_damaged_file_is_named(folder: Path, name: str, damage: str | None) -> None:
    """One bad file must not cost the card of a run of hours; nor may its place be filled with a guess in silence."""
    (folder / name).unlink() if damage is None else (folder / name).write_text(damage)
    text, missing = card_of_folder(folder)
    assert [line for line in missing if line.startswith(f"{name}: ")], missing
    assert name in text.split("could not say")[1]
    assert not faults(text)


@pytest.mark.parametrize("kept", FILES)
def test_one_file_alone_makes_a_card(folder: Path, kept: str) -> None:
    """Whatever is left says something."""
    for name in {*FILES} - {kept}:
        (folder / name).unlink()
    text, missing = card_of_folder(folder)
    assert {line.split(":")[0] for line in missing} >= {*FILES} - {kept, "adapter_config.json"}
    assert not faults(text)
    said = {
        "run.json": "- Hardware: cpu" if "cpu" in str(whole_run()["hardware"]) else "- Hardware: ",
        "report.json": "89.3% (86.3 to 91.7)",
        "recipe.yaml": "A LoRA adapter (rank 16, alpha 32) was trained on",
        "adapter_config.json": "A LoRA adapter (rank 8, alpha 16) was trained on `org/small`",
    }
    assert said[kept] in text


def test_an_older_record_says_what_it_lacks(folder: Path) -> None:
    """A reader can't tell an older version's silence from a measurement that was refused."""
    run, report = whole_run(), whole_report()
    for key in ("origins", "energy", "parameters"):
        run.pop(key, None)
    del report["fidelity"]
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "report.json").write_text(json.dumps(report))
    text, missing = card_of_folder(folder)
    assert [line.split(":")[0] for line in missing] == [
        "run.json has no origins",
        "run.json has no energy",
        "run.json has no parameters",
        "report.json has no fidelity",
    ]
    assert "- Energy: not measured" in text and "Is it its teacher" not in text


def test_nothing_to_make_a_card_from(tmp_path: Path) -> None:
    """An empty card, pushed, would replace one that says something."""
    with pytest.raises(CardError, match="holds nothing to make a card from"):
        card_of_folder(tmp_path)
    with pytest.raises(CardError, match="is not there"):
        card_of_folder(tmp_path / "none")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CardError, match="is a file"):
        card_of_folder(tmp_path / "run.json")
    with pytest.raises(CardError, match="holds nothing to make a card from"):
        card_of_folder(tmp_path)


def test_a_merged_model_is_loaded_as_a_whole(folder: Path) -> None:
    """Who downloads merged weights and is told to load an adapter gets an error."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    (folder / "model.safetensors").touch()
    text, missing = card_of_folder(folder)
    assert missing == []
    assert "PeftModel" not in text and metadata_of(text)["library_name"] == "transformers"
    assert "A LoRA adapter (rank 16" in text, "what was trained is still told"


def test_a_card_that_a_person_changed_stays(folder: Path) -> None:
    """An hour's writing of intended uses and limits must not be lost to a command."""
    text, _ = card_of_folder(folder)
    path = write_card(folder / "README.md", text)
    assert is_untouched(path.read_text())
    write_card(path, text)
    edited = text.replace("Intended use: **TO FILL IN**", "Intended use: past tenses")
    path.write_text(edited)
    with pytest.raises(CardError, match="changed by hand.*--out.*--overwrite"):
        write_card(path, text)
    assert path.read_text() == edited
    write_card(path, text, overwrite=True)
    assert path.read_text() == text
    path.write_text("# My model\n")
    with pytest.raises(CardError):
        write_card(path, text)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CardError):
        write_card(path, text)
    path.write_bytes(text.replace("\n", "\r\n").encode())
    write_card(path, text)
    assert [one.name for one in folder.glob(".*")] == [], "no draft is left"


def test_the_command_writes_the_card_and_lists_what_it_lacks(folder: Path) -> None:
    """A list that only the card holds is read after the push."""
    (folder / "report.json").unlink()
    done = CliRunner().invoke(app, ["card", str(folder)])
    assert done.exit_code == 0, done.output
    assert "Missing     report.json: not there (no results)" in done.output
    assert is_untouched((folder / "README.md").read_text())
    (folder / "README.md").write_text("mine\n")
    done = CliRunner().invoke(app, ["card", str(folder)])
    assert done.exit_code == 2 and (folder / "README.md").read_text() == "mine\n"
    other = folder / "elsewhere" / "card.md"
    assert CliRunner().invoke(app, ["card", str(folder), "--out", str(other)]).exit_code == 0
    assert other.read_text().startswith("---\n")
    assert CliRunner().invoke(app, ["card", str(folder), "--overwrite"]).exit_code == 0
    assert (folder / "README.md").read_text() == other.read_text()
    done = CliRunner().invoke(app, ["card", str(folder / "none")])
    assert done.exit_code == 2 and "expected the output folder of a run" in done.output


def test_the_page_is_written_on_request(folder: Path) -> None:
    """The page is asked for by those who have no browser for Markdown; without being asked for it costs nothing."""
    assert CliRunner().invoke(app, ["card", str(folder)]).exit_code == 0
    assert not (folder / "report.html").exists()
    done = CliRunner().invoke(app, ["card", str(folder), "--html"])
    assert done.exit_code == 0, done.output
    page = (folder / "report.html").read_text()
    assert "<html" in page and "data:image/png;base64," in page and "89.3" in page


def test_the_command_needs_no_torch(folder: Path) -> None:
    """`hfkd card` is for a laptop without a training environment too."""
    code = (
        "import sys; from typer.testing import CliRunner; from hfkd.cli.main import app;"
        f"done = CliRunner().invoke(app, ['card', {str(folder)!r}]); print(done.exit_code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"], done.stdout
