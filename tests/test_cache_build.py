"""How a cache is built: whole shards or none, the same bytes whatever happened, and refusals that name the field."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from caches import build, content, make_dataset, make_writer, speaker
from conftest import make_model, make_tokenizer
from training import ROWS

from hfkd import PromptStyle
from hfkd.batch import View
from hfkd.cache import (
    CacheError,
    CacheReader,
    Hidden,
    Manifest,
    Sampled,
    TopK,
    clear_cache,
    find_faults,
    make_plan,
    row_key,
    texts_of,
    view_keys,
)

CODECS = [TopK(16), TopK(16, True), Sampled(20), Sampled(20, 0.8, True), Hidden(), Hidden("bfloat16")]
_IDS = ["topk", "topk-compact", "sampled", "sampled-compact", "hidden", "hidden-bfloat16"]


# --- what a build leaves behind


def test_a_key_is_the_text_and_what_is_learned_of_it() -> None:
    """Rows that are found by anything else would teach another text's distributions."""
    ids, labels = [5, 6, 7, 8], [-100, -100, 7, 8]
    key = row_key(ids, labels)
    assert len(key) == 32
    assert key != row_key([5, 6, 7, 9], [-100, -100, 7, 9])
    assert key != row_key(ids, [-100, 6, 7, 8]), "the same text with other tokens learned"
    assert key != row_key([*ids, 0], [*labels, -100]), "a text that goes on"
    pad = torch.tensor([[2, 2, 5, 6, 7, 8], [5, 6, 7, 8, 2, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    marks = torch.tensor([[-100] * 4 + [7, 8], [-100, -100, 7, 8, -100, -100]])
    assert view_keys(View(pad, mask, marks)) == ([key, key], [2, 2])


@pytest.mark.parametrize("codec", CODECS, ids=_IDS)
def test_shards_are_a_data_set(tmp_path: Path, codec) -> None:
    """A cache that only its own reader opens can't be looked at, shared or counted."""
    manifest = build(tmp_path / "cache", codec)
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "cache" / "part-*.parquet"), cache_dir=str(tmp_path / "hf")
    )["train"]
    assert loaded.column_names == ["row_hash", "tokens", *codec.columns()]
    assert len(loaded) == 16 and sum(loaded["tokens"]) == manifest.build["tokens"]
    keys = {row_key(text["input_ids"], text["labels"]) for text in texts_of(make_dataset())}
    assert set(loaded["row_hash"]) == keys
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("part-*"))
    assert manifest.facts["bytes_per_token"] == pytest.approx(size / manifest.build["tokens"], abs=0.01)


def test_nothing_but_the_cache_is_left(tmp_path: Path) -> None:
    """Notes and drafts of the build are no part of a cache, and no path or date of the machine is in it."""
    manifest = build(tmp_path / "cache", Hidden())
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert names == {"manifest.json", "head.safetensors", *(shard["name"] for shard in manifest.shards)}
    assert not find_faults(tmp_path / "cache", manifest)
    assert str(tmp_path) not in (tmp_path / "cache" / "manifest.json").read_text()


def test_the_longest_texts_come_first_and_each_once() -> None:
    """Batches by length waste little; a text that stands in the data twice needs the teacher once."""
    texts = list(texts_of(make_dataset([*ROWS[:16], *ROWS[:4]])))
    plan = make_plan(texts, batch_size=4, bytes_per_token=10)
    assert len(texts) == 20 and len(plan.order) == 16
    lengths = [len(texts[number]["input_ids"]) for number in plan.order]
    assert lengths == sorted(lengths, reverse=True)
    shuffled = make_plan(texts[::-1], batch_size=4, bytes_per_token=10)
    assert shuffled.keys == plan.keys and shuffled.shards == plan.shards
    assert [place for shard in plan.shards for place in shard] == list(range(16))
    assert len(make_plan(texts, 4, 10, shard_bytes=1).shards) == 4, "a shard holds whole batches"


# --- interrupted builds


class _Killed(BaseException):
    pass


def _stop_after(monkeypatch: pytest.MonkeyPatch, replaces: int) -> None:
    """Die in the place of a file's move, after so many of them."""
    left, move = [replaces], os.replace

    def dying(source, target):
        if left[0] == 0:
            raise _Killed
        left[0] -= 1
        move(source, target)

    monkeypatch.setattr(os, "replace", dying)


@pytest.mark.parametrize("codec", [TopK(16, True), Sampled(20, 0.8), Hidden()], ids=["topk", "sampled", "hidden"])
def test_interrupted_at_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec) -> None:
    """Whatever file was being written, a second run leaves what an undisturbed one leaves, to the last byte."""
    build(tmp_path / "straight", codec)
    straight, stopped = content(tmp_path / "straight"), 0
    for replaces in range(1, 12):
        with monkeypatch.context() as patch:
            _stop_after(patch, replaces)
            try:
                build(tmp_path / "cache", codec)
            except _Killed:
                stopped += 1
                with pytest.raises(CacheError, match="interrupted"):
                    CacheReader(tmp_path / "cache", Manifest.read(tmp_path / "cache"))
        build(tmp_path / "cache", codec)
        assert content(tmp_path / "cache") == straight
        shutil.rmtree(tmp_path / "cache")
    assert stopped >= 8


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_again_and_again(tmp_path: Path, kills: int) -> None:
    """The same with a real process and SIGKILL, at moments that nobody chose."""
    codec = Sampled(20)
    build(tmp_path / "straight", codec)
    for moment in range(kills):
        with _start(tmp_path / "cache") as worker:
            _wait_for_shards(worker, tmp_path / "cache", moment)
            os.kill(worker.pid, signal.SIGKILL)
        assert Manifest.read(tmp_path / "cache").status == "building", "the process was to be killed before its end"
    dataset, model = make_dataset(), make_model(seed=1)
    writer = make_writer(tmp_path / "cache", codec, dataset, model)
    assert not writer.open()
    writer.begin()
    writer.write(speaker(model, dataset.shared_prefix))
    writer.finish()
    assert content(tmp_path / "cache") == content(tmp_path / "straight")


_WORKER = """
import sys, time
sys.path[:0] = {paths!r}
from caches import make_dataset, make_model, make_writer, speaker
from hfkd.cache import Sampled
dataset, model = make_dataset(), make_model(seed=1)
writer = make_writer(__import__("pathlib").Path({folder!r}), Sampled(20), dataset, model)
assert not writer.open()
writer.begin()
say = speaker(model, dataset.shared_prefix)
writer.write(lambda view: (time.sleep({pause}), say(view))[1])
time.sleep(60)
"""


def _start(folder: Path, pause: float = 0.05) -> subprocess.Popen:
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    code = _WORKER.format(paths=paths, folder=str(folder), pause=pause)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)


def _wait_for_shards(worker: subprocess.Popen, folder: Path, count: int) -> None:
    """Until there is a manifest and so many shards (or all that are left)."""
    deadline = time.monotonic() + 120
    while not (folder / "manifest.json").exists() or len(list(folder.glob("part-*.parquet"))) < min(count, 3):
        assert worker.poll() is None, "the build failed"
        assert time.monotonic() < deadline, "the build never got so far"
        time.sleep(0.005)


def test_shares_of_any_number_of_processes_give_the_same_bytes(tmp_path: Path) -> None:
    """A cache that depends on how many built it can't be checked by building it again."""
    codec = TopK(16, True)
    build(tmp_path / "one", codec)
    for count in (2, 3):
        folder, dataset = tmp_path / str(count), make_dataset()
        models = [make_model(seed=1) for _ in range(count)]
        writers = [make_writer(folder, codec, dataset, model) for model in models]
        assert not any(writer.open() for writer in writers)
        writers[0].begin()
        for index in reversed(range(count)):
            writers[index].write(speaker(models[index], dataset.shared_prefix), (index, count))
            assert len(list(folder.glob("part-*.parquet"))) < 4 or index == 0, "each wrote its share only"
        writers[0].finish()
        assert content(folder) == content(tmp_path / "one")


def test_a_shard_that_was_damaged_in_between_is_written_anew(tmp_path: Path) -> None:
    """A build that goes on must not take a torn shard of the first part for whole."""
    dataset, model = make_dataset(), make_model(seed=1)
    writer = make_writer(tmp_path / "cache", TopK(16), dataset, model)
    writer.open()
    writer.begin()
    writer.write(speaker(model), (0, 2))
    shard = next((tmp_path / "cache").glob("part-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-7])
    again = make_writer(tmp_path / "cache", TopK(16), dataset, model)
    assert not again.open()
    assert int(shard.stem.removeprefix("part-")) in again.missing and len(again.missing) < len(again.plan.shards) + 1


def test_building_twice_does_nothing(tmp_path: Path) -> None:
    """Who runs the command again wants the cache, not an hour of the teacher."""
    build(tmp_path / "cache", TopK(16))
    before = content(tmp_path / "cache")
    writer = make_writer(tmp_path / "cache", TopK(16))
    assert writer.open()
    assert content(tmp_path / "cache") == before


# --- what is refused


OTHER = {
    "codec.k": {"codec": TopK(17)},
    "codec.form": {"codec": TopK(16, True)},
    "codec.kind": {"codec": Hidden()},
    "temperature": {"temperature": 2.0},
    "teacher.revision": {"teacher": {"revision": "v2"}},
    "data.sha256": {"dataset": lambda: make_dataset(ROWS[:16][::-1])},
    "data.rows": {"dataset": lambda: make_dataset(ROWS[:15])},
    "prompt": {"dataset": lambda: make_dataset(style=PromptStyle(system="Be brief."))},
    "build.batch_size": {"batch_size": 5},
    "vocab_size": {"model": lambda: make_model(seed=1, vocab_size=400)},
}


def _template(template: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return make_dataset(tokenizer=tokenizer)


def _tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    return make_dataset(tokenizer=tokenizer)


OTHER["template"] = {"dataset": lambda: _template("{{ messages }}")}
OTHER["tokenizer"] = {"dataset": _tokenizer}


@pytest.mark.parametrize("status", ["building", "complete"])
@pytest.mark.parametrize("field", OTHER)
def test_another_cache_in_the_folder_is_named(tmp_path: Path, field: str, status: str) -> None:
    """Shards of two caches in one folder would be one wrong cache."""
    build(tmp_path / "cache", TopK(16))
    if status == "building":
        manifest = Manifest.read(tmp_path / "cache")
        manifest.status, manifest.shards, manifest.facts = "building", [], {}
        manifest.write(tmp_path / "cache")
    before = content(tmp_path / "cache")
    changes = {name: value() if callable(value) else value for name, value in OTHER[field].items()}
    writer = make_writer(tmp_path / "cache", **{"codec": TopK(16), **changes})
    with pytest.raises(CacheError, match=rf"\b{field}: the cache has .*, this run has .*--overwrite"):
        writer.open()
    assert content(tmp_path / "cache") == before


def test_shards_without_a_manifest_are_not_trusted(tmp_path: Path) -> None:
    """Without a contract nobody knows what they are."""
    build(tmp_path / "cache", TopK(16))
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(CacheError, match="no manifest.json.*--overwrite"):
        make_writer(tmp_path / "cache", TopK(16)).open()
    (tmp_path / "cache" / "mine.txt").write_text("stays")
    clear_cache(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["mine.txt"]
    (tmp_path / "cache" / "manifest.json").write_text('{"name": "my app"}')
    with pytest.raises(CacheError, match="no cache's"):
        clear_cache(tmp_path / "cache")


def test_states_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """A teacher that overflowed would teach nothing but NaN, and only at the batch that holds it."""
    model = make_model(seed=1)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(CacheError, match="aren't finite"):
        build(tmp_path / "cache", TopK(16), model=model)


# --- a disk that fills up


def test_too_little_space_is_found_before_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of a teacher must not end on a full disk that could have been measured first."""
    writer = make_writer(tmp_path / "cache", TopK(16))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1024))
    with pytest.raises(CacheError, match=r"needs up to 4\d\.\d KiB.*4 shards.*1\.0 KiB are free.*--compact"):
        writer.open()
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_fills_up_leaves_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half-written may be taken for whole, the message says how much is needed, and the build goes on."""
    codec = TopK(16)
    build(tmp_path / "straight", codec)
    fsync, left = os.fsync, [5]

    def full(number: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CacheError, match=r"full: up to .* KiB are needed for the \d shards.*goes on from there"):
            build(tmp_path / "cache", codec)
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert not any("draft" in name for name in names)
    whole = [name for name in names if name.endswith(".parquet")]
    assert whole and all(content(tmp_path / "cache")[name] == content(tmp_path / "straight")[name] for name in whole)
    build(tmp_path / "cache", codec)
    assert content(tmp_path / "cache") == content(tmp_path / "straight")


def test_another_fault_of_the_disk_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is told to make room where the rights are missing looks in the wrong place."""

    def refuse(number: int) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(PermissionError):
        build(tmp_path / "cache", TopK(16))


# --- damage


@pytest.mark.parametrize("codec", [TopK(16), Hidden()], ids=["topk", "hidden"])
def test_damage_is_found_and_named(tmp_path: Path, codec) -> None:
    """One flipped byte in gigabytes teaches a wrong distribution and looks like noise."""
    folder = tmp_path / "cache"
    manifest = build(folder, codec)
    shard = folder / "part-00002.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    assert find_faults(folder, manifest) == ["part-00002.parquet has other bytes than the manifest says (sha256)"]
    assert not find_faults(folder, manifest, (0, 2)) == find_faults(folder, manifest, (1, 2)), "each has its share"
    shard.write_bytes(whole[:-1])
    assert "part-00002.parquet has" in find_faults(folder, manifest)[0] and "cut" in find_faults(folder, manifest)[0]
    shard.unlink()
    assert find_faults(folder, manifest) == ["part-00002.parquet is missing"]
    if codec.kind == "hidden":
        shard.write_bytes(whole)
        (folder / "head.safetensors").write_bytes(b"x")
        assert "head.safetensors" in find_faults(folder, manifest)[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace('"temperature": 1.0', '"temperature": 2.0'), "edited"),
        (lambda text: text.replace('"status": "complete"', '"status": "building"'), "edited"),
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: json.dumps({"status": "complete"}), "damaged"),
    ],
)
def test_an_edited_manifest_is_refused(tmp_path: Path, change, words: str) -> None:
    """A contract that anybody may change is none."""
    build(tmp_path / "cache", TopK(16))
    path = tmp_path / "cache" / "manifest.json"
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(CacheError, match=rf"manifest.json.*{words}.*--overwrite"):
        Manifest.read(tmp_path / "cache")


def test_another_format_is_refused(tmp_path: Path) -> None:
    """A later format that is read by an earlier version must not be guessed at."""
    manifest = build(tmp_path / "cache", TopK(16))
    manifest.contract["format_version"] = 99
    manifest.write(tmp_path / "cache")
    with pytest.raises(CacheError, match="format_version: .* 99"):
        Manifest.read(tmp_path / "cache")
