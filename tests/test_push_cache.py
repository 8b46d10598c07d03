"""A teacher's cache as a data set of the hub, against a hub in this process."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from caches import build
from hub_server import Fault, File, Hub, hub_for
from huggingface_hub import snapshot_download
from rich.console import Console
from runs import SECRET, whole_run

from hfkd.cache import CacheError, CacheReader, Manifest, TopK
from hfkd.hub import push, push_cache


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process talks to."""
    with hub_for(tmp_path, monkeypatch) as served:
        yield served


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A finished cache, with what lies beside one."""
    folder = tmp_path / "cache"
    build(folder, TopK(4))
    for name in (".env", "run.json", "notes.parquet", "checkpoint-1/optimizer.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(SECRET)
    return folder


def test_it_arrives_whole_and_can_be_read(hub: Hub, cache: Path, tmp_path: Path) -> None:
    """A cache that can't be read where it arrives was uploaded for nothing."""
    before = content_of(cache)
    assert push_cache(cache, "me/cache").changed
    assert content_of(cache) == before, "a run's own card may lie there"
    files = hub.files("me/cache", "dataset")
    shards = [shard["name"] for shard in Manifest.read(cache).shards]
    assert set(files) == {"README.md", "manifest.json", *shards} and hub.repositories["dataset", "me/cache"].private
    header = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert header["configs"] == [{"config_name": "default", "data_files": "part-*.parquet"}]
    assert SECRET.encode() not in hub.everything() and len(hub.messages("me/cache", "dataset")) == 1
    fetched = Path(snapshot_download("me/cache", repo_type="dataset", local_dir=tmp_path / "fetched"))
    assert CacheReader(fetched, Manifest.read(fetched)).manifest == Manifest.read(cache)
    assert all((fetched / name).read_bytes() == (cache / name).read_bytes() for name in shards)
    assert not push_cache(cache, "me/cache").changed and len(hub.messages("me/cache", "dataset")) == 1


def test_what_an_older_cache_left_goes(hub: Hub, cache: Path) -> None:
    """Shards of an older cache would be rows of this one."""
    made = hub.make("me/cache", "dataset")
    old = {name: File(b"old", False) for name in ("part-00007.parquet", "head.safetensors", "part-mine.parquet")}
    made.commit("old", {**made.at()["files"], **old})
    push_cache(cache, "me/cache")
    assert "part-mine.parquet" in hub.files("me/cache", "dataset")
    assert not {"part-00007.parquet", "head.safetensors"} & set(hub.files("me/cache", "dataset"))


def test_answers_of_the_teacher_go_with_their_cache(hub: Hub, cache: Path) -> None:
    """Without them nobody could train from such a cache; with a secret in them they must not go."""
    (cache / "teacher_answers.jsonl").write_text('{"prompt": "in /home/anna/x", "answer": "yes"}\n')
    push_cache(cache, "me/cache")
    assert b"/home/anna/x" in hub.files("me/cache", "dataset")["teacher_answers.jsonl"], (
        "a text of the data is changed"
    )
    (cache / "teacher_answers.jsonl").write_text(f'{{"prompt": "{SECRET}"}}\n')
    with pytest.raises(ValueError, match=r"teacher_answers\.jsonl in .* holds what looks like a token") as caught:
        push_cache(cache, "me/cache")
    assert SECRET not in str(caught.value)


def test_half_a_cache_is_refused(hub: Hub, cache: Path) -> None:
    """Half a cache on the hub would be taken for a whole one by everybody else."""
    shard = cache / Manifest.read(cache).shards[0]["name"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="damaged or not whole"):
        push_cache(cache, "me/cache")
    shard.unlink()
    with pytest.raises(CacheError, match="lacks part-00000.parquet"):
        push_cache(cache, "me/cache")
    shard.write_bytes(whole)
    manifest = Manifest.read(cache)
    manifest.status = "building"
    manifest.write(cache)
    with pytest.raises(CacheError, match="isn't finished"):
        push_cache(cache, "me/cache")
    assert not hub.requests


def test_a_run_takes_its_cache_along(hub: Hub, cache: Path, tmp_path: Path) -> None:
    """A model's repository may be there when the data set's name is refused: both are looked at first."""
    folder, _ = whole_run(tmp_path / "run")
    console = Console(file=io.StringIO(), width=200)
    hub.make("me/it-cache", "dataset", private=False)
    with pytest.raises(ValueError, match="me/it-cache is there already and is public"):
        push(folder, "me/it", cache=cache, console=console)
    assert ("model", "me/it") not in hub.repositories
    hub.faults = [Fault("POST", "datasets/lab/c/commit", 503, times=1000)]
    with pytest.raises(OSError, match="trouble of its own"):
        push(folder, "me/it", cache=cache, cache_repo="lab/c", console=console)
    hub.faults = []
    done = push(folder, "me/it", cache=cache, cache_repo="lab/c", console=console)
    assert [one.changed for one in done.sent] == [False, True]
    assert "manifest.json" in hub.files("lab/c", "dataset") and len(hub.messages("me/it")) == 1
    assert "lab/c (data set, private if it is new)" in console.file.getvalue()


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
