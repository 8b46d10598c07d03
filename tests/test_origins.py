"""Where models and rows come from: read from cards and caches, never guessed, and never in the way of a run."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from hfkd.origins import licence_of, origin_of_model, origin_of_rows

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_card(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(text)
    return folder


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that answers nothing, and an empty cache; what it was asked."""
    asked: list[str] = []

    def refuse(self: object, name: str, **options: object) -> None:
        asked.append(name)
        raise ConnectionError("token hf_aaaaaaaaaaaaaaaaaaaaaaaa was refused")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return asked


def test_a_folder_with_a_card(tmp_path: Path, no_hub: list[str]) -> None:
    """The licence of a downloaded model stands in its own card; nobody has to be asked."""
    folder = write_card(tmp_path / "model", "---\nlicense: apache-2.0\n---\n# A model\n")
    found = origin_of_model(folder, "main")
    assert found == {"id": "model", "source": "folder", "revision": "main", "licence": "apache-2.0"}
    assert not no_hub


@pytest.mark.parametrize(
    "text", ["", "# No metadata", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense:\n---\n", "\xff", "---\n"]
)
def test_a_folder_without_a_usable_card(tmp_path: Path, text: str) -> None:
    """Whatever lies there, a run doesn't end over it, and no licence is invented."""
    write_card(tmp_path, text)
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert origin_of_model(tmp_path)["licence"] is None


def test_a_snapshot_of_the_cache_is_its_id(tmp_path: Path) -> None:
    """A path into one machine's cache names nothing to anybody else; it holds id and commit."""
    folder = write_card(tmp_path / "models--org--small" / "snapshots" / COMMIT, "---\nlicense: mit\n---\n")
    found = origin_of_model(folder)
    assert found == {"id": "org/small", "source": "hub", "revision": COMMIT, "licence": "mit"}


def test_a_model_that_is_not_in_the_cache_has_the_revision_that_was_asked_for(no_hub: list[str]) -> None:
    """The commit that a branch has by now isn't the one that was loaded elsewhere."""
    assert origin_of_model("org/small", "v1")["revision"] == "v1"
    assert origin_of_model("org/small")["revision"] is None
    assert no_hub == ["org/small", "org/small"]


def test_a_cached_card_is_read_before_the_hub_is_asked(tmp_path: Path, no_hub: list[str]) -> None:
    """Offline clusters have the card in their cache."""
    for kind in ("models", "datasets"):
        folder = tmp_path / "hub" / f"{kind}--org--small" / "snapshots" / COMMIT
        write_card(folder, f"---\nlicense: {kind}-licence\n---\n")
    assert origin_of_model("org/small", COMMIT)["licence"] == "models-licence"
    assert origin_of_rows("org/small", COMMIT)["licence"] == "datasets-licence"
    assert not no_hub


def test_the_hub_is_asked_and_its_answer_taken(no_hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no card is cached, the hub knows."""
    card = SimpleNamespace(to_dict=lambda: {"license": "other", "license_name": "our-terms"})
    answer = lambda self, name, **options: SimpleNamespace(sha=COMMIT, card_data=card)  # noqa: E731
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", answer)
    found = origin_of_rows("org/rows", "v2")
    assert found == {"id": "org/rows", "source": "hub", "revision": COMMIT, "licence": "our-terms"}


def test_a_hub_that_hangs_costs_seconds(no_hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A firewall that swallows packets must not hold up every run."""
    monkeypatch.setattr("hfkd.origins._LONGEST_WAIT", 0.2)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, **options: time.sleep(5))
    began = time.perf_counter()
    assert origin_of_model("org/small")["licence"] is None
    assert time.perf_counter() - began < 2


def test_no_error_and_no_token_comes_out(no_hub: list[str], capsys: pytest.CaptureFixture) -> None:
    """The message of a refused request holds the token, and this goes into run.json."""
    found = origin_of_model("org/private")
    assert found["licence"] is None and "hf_" not in str(found)
    assert "hf_" not in "".join(capsys.readouterr())


def test_rows_of_every_kind(tmp_path: Path, no_hub: list[str]) -> None:
    """What a card says of its data depends on this word."""
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    assert origin_of_rows(file) == {"id": "rows.jsonl", "source": "file", "revision": None, "licence": None}
    write_card(tmp_path, "---\nlicense: cc-by-4.0\n---\n")
    assert origin_of_rows(file)["licence"] == "cc-by-4.0"
    assert origin_of_rows(tmp_path)["source"] == "folder"
    assert origin_of_rows("reasoning_gym:leg_counting")["source"] == "generator"
    assert origin_of_rows("https://user:secret@example.org/rows.jsonl")["source"] == "file"
    assert "secret" not in origin_of_rows("https://user:secret@example.org/rows.jsonl")["id"]
    assert origin_of_rows("no/such/file.jsonl")["source"] == "file"
    assert not no_hub


def test_which_licences_are_known() -> None:
    """ "unknown" as a licence would make two unknown ones agree."""
    for given in (None, "unknown", "other", "", [], ["mit", "apache-2.0"], 3):
        assert licence_of({"license": given}) is None
    assert licence_of({"license": ["mit"]}) == "mit"
    assert licence_of({"license": "other", "license_name": "x"}) == "x"
