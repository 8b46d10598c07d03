"""Which commit of the hub a model or a data set is of: read off a cache as the hub's own client lays it out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from hfkd import LocalTeacher
from hfkd.loading import commit_of
from hfkd.origins import origin_of_model, origin_of_rows
from hfkd.recipe.schema import StudentSection
from hfkd.run.subjects import identity
from hfkd.sharding import Launch

OLD, NEW, INNER = "0123456789abcdef0123456789abcdef01234567", "89abcdef" * 5, "fedcba98" * 5
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model at two commits: `v1` is the first of them, `main` the second."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    repository = folder / "models--org--small"
    for seed, (name, commit) in enumerate({"v1": OLD, "main": NEW}.items()):
        for place in (repository / "snapshots" / commit, repository / "snapshots" / commit / "inner"):
            make_model(seed=seed, num_hidden_layers=1, **SIZES).save_pretrained(place)
            make_tokenizer().save_pretrained(place)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    (repository / "snapshots" / NEW / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.mark.parametrize(("asked", "commit"), [(None, NEW), ("main", NEW), ("v1", OLD), (OLD, OLD)])
def test_the_commit_is_that_of_the_files_that_were_loaded(cache: Path, asked: str | None, commit: str) -> None:
    """A branch moves; a card that says `main`, or nothing, names other weights in a month."""
    model = AutoModelForCausalLM.from_pretrained("org/small", revision=asked)
    assert commit_of("org/small", {"revision": asked}) == commit
    assert origin_of_model("org/small", asked, model.config)["revision"] == commit


def test_the_card_of_that_commit_is_read(cache: Path) -> None:
    """The licence of another commit may be another one."""
    found = origin_of_model("org/small", "main")
    assert found == {"id": "org/small", "source": "hub", "revision": NEW, "licence": "mit"}
    assert origin_of_model("org/small", "v1") == {**found, "revision": OLD, "licence": None}


def test_where_the_files_lie_is_part_of_the_question(cache: Path, tmp_path: Path) -> None:
    """A cache of its own, or a model in a folder of the repository, and the commit isn't found or is another's."""
    own = tmp_path / "own"
    own.mkdir()
    (cache / "models--org--small").rename(own / "models--org--small")
    assert commit_of("org/small") is None
    assert origin_of_model("org/small", load_kwargs={"cache_dir": str(own)})["revision"] == NEW
    snapshot = own / "models--org--small" / "snapshots" / NEW
    (snapshot / "config.json").unlink()
    given = {"cache_dir": str(own), "subfolder": "inner"}
    AutoModelForCausalLM.from_pretrained("org/small", **given)
    assert commit_of("org/small", given) == NEW and commit_of("org/small", {"cache_dir": str(own)}) is None
    (snapshot / "weights.gguf").write_bytes(b"GGUF")
    assert commit_of("org/small", {"cache_dir": str(own), "gguf_file": "weights.gguf"}) == NEW


def test_a_folder_has_a_commit_only_as_a_snapshot(cache: Path, tmp_path: Path) -> None:
    """The commit of a model that happens to lie beside a folder of the same name."""
    assert commit_of(str(cache / "models--org--small" / "snapshots" / OLD)) == OLD
    for name in (str(tmp_path), "no/such/model", "org/absent", "", "x" * 5000, "a\0b"):
        assert commit_of(name) is None


def test_a_local_teacher_says_which_commit_teaches(cache: Path) -> None:
    """A card whose teacher has no revision can't be reproduced; before loading none is known, and none is guessed."""
    teacher = LocalTeacher("org/small")
    assert teacher.describe()["revision"] is None
    teacher.prepare(Launch(torch.device("cpu")), make_model())
    assert teacher.describe()["revision"] == NEW
    (cache / "models--org--small" / "refs" / "main").write_text(OLD)
    assert teacher.describe()["revision"] == NEW, "another process fetched another commit since"
    tagged = LocalTeacher("org/small", revision="v1")
    assert tagged.describe()["revision"] == "v1"
    tagged.prepare(Launch(torch.device("cpu")), make_model())
    assert tagged.describe()["revision"] == OLD


def test_an_evaluation_knows_a_changed_model(cache: Path) -> None:
    """Results of yesterday's weights are taken for today's, because both are of `main`."""
    section = StudentSection(model="org/small")
    assert identity("org/small", section) == {"id": "org/small", "revision": None, "commit": NEW}
    (cache / "models--org--small" / "refs" / "main").write_text(OLD)
    assert identity("org/small", section)["commit"] == OLD


# --- data sets


def answer(monkeypatch: pytest.MonkeyPatch, card: object = None) -> list[str | None]:
    """A hub that knows one commit of every data set; which revisions it was asked for."""
    asked: list[str | None] = []

    def told(self: object, name: str, revision: str | None = None, **options: object) -> SimpleNamespace:
        assert options["timeout"] < 10
        asked.append(revision)
        return SimpleNamespace(sha=INNER, card_data=card)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", told)
    return asked


@pytest.mark.parametrize("asked", [None, "main", "v1"])
def test_the_hub_says_the_commit_of_a_data_set(
    cache: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None
) -> None:
    """Rows are added to a data set under the same name; a card in the cache, which is of any commit, can't tell."""
    snapshot = cache / "datasets--org--rows" / "snapshots" / OLD
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    (cache / "datasets--org--rows" / "refs").mkdir()
    (cache / "datasets--org--rows" / "refs" / (asked or "main")).write_text(OLD)
    questions = answer(monkeypatch)
    found = origin_of_rows("org/rows", asked)
    assert found == {"id": "org/rows", "source": "hub", "revision": INNER, "licence": "cc0-1.0"}
    assert questions == [asked]


def test_a_commit_that_was_asked_for_is_the_commit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known already is asked for again, or written over."""
    assert answer(monkeypatch) == []
    assert origin_of_rows("org/rows", OLD)["revision"] == OLD


def test_without_a_hub_the_commit_of_a_data_set_stays_open(cache: Path) -> None:
    """A revision that nobody knows, made up; or a run that fails offline."""
    assert origin_of_rows("org/rows")["revision"] is None
    assert origin_of_rows("org/rows", "v1")["revision"] == "v1"
