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
from dataclasses import replace
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
from hfkd.cache.folder import LOCK_NAME, alone_in

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
    assert clear_cache(tmp_path / "cache") and not content(tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "text"),
    [("manifest.json", '{"name": "my app"}'), ("manifest.json", "[]"), ("part-00000.parquet", "mine")],
)
def test_files_that_only_have_a_caches_names_stay(tmp_path: Path, name: str, text: str) -> None:
    """`--overwrite` in a folder of a user's would delete an app's manifest or somebody else's data."""
    (tmp_path / name).write_text(text)
    (tmp_path / "part-00001.json").write_text("{}")
    before = content(tmp_path)
    with pytest.raises(CacheError, match="nothing is deleted"):
        clear_cache(tmp_path)
    assert content(tmp_path) == before


def test_what_lies_beside_a_cache_stays(tmp_path: Path) -> None:
    """Files whose names merely resemble a cache's were deleted with it, and so were those that a build cleaned up."""
    names = ("mine.txt", "README.md", "part-notes.json", "part-1.parquet", "model.safetensors", ".x.draft-7")
    tmp_path.joinpath("cache").mkdir()
    for name in names:
        (tmp_path / "cache" / name).write_text("mine")
    build(tmp_path / "cache", Hidden())
    assert clear_cache(tmp_path / "cache")
    assert content(tmp_path / "cache") == dict.fromkeys(sorted(names), b"mine")
    assert not clear_cache(tmp_path / "cache")


def test_a_draft_of_a_killed_write_does_not_block_the_folder(tmp_path: Path) -> None:
    """A build that was killed in its first write leaves no manifest, and nothing to be afraid of."""
    (tmp_path / ".manifest.json.draft-12").write_text("{")
    assert not make_writer(tmp_path, TopK(16)).open()
    assert clear_cache(tmp_path) and not content(tmp_path)


def test_one_build_at_a_time(tmp_path: Path) -> None:
    """Two builds in one folder delete each other's drafts and end in an error that names a file nobody knows."""
    folder = tmp_path / "cache"
    with alone_in(folder):
        with pytest.raises(CacheError, match="Another build runs in"), alone_in(folder):
            pass
        build(folder, TopK(16))
    assert find_faults(folder, Manifest.read(folder)) == [] and not (folder / LOCK_NAME).exists()
    (folder / LOCK_NAME).write_text("")  # as a killed build leaves it
    with alone_in(folder):
        pass
    assert not (folder / LOCK_NAME).exists()
    with alone_in(tmp_path / "nothing"):
        pass
    assert not (tmp_path / "nothing").exists(), "a build that was refused leaves no folder"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """A bare "File exists" doesn't say which option is wrong, nor does the advice to build into a file."""
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CacheError, match="--out: .* is a file"), alone_in(place):
            pass
    with pytest.raises(CacheError, match="is a file; a cache is a folder"):
        Manifest.read(tmp_path / "file")


def test_more_ids_than_there_are_leave_no_folder(tmp_path: Path) -> None:
    """A manifest that was written before the fault was found would refuse the mended command."""
    with pytest.raises(CacheError, match="k is 500.*384"):
        make_writer(tmp_path / "cache", TopK(500)).open()
    assert not (tmp_path / "cache").exists()


def test_a_build_goes_on_in_its_own_batches(tmp_path: Path) -> None:
    """Who gave another --batch-size after a kill was told to delete hours of work."""
    writer = make_writer(tmp_path / "cache", TopK(16))
    writer.open()
    writer.begin()
    with pytest.raises(CacheError, match=r"build.batch_size.*begun with --batch-size 4 and goes on.*--overwrite"):
        make_writer(tmp_path / "cache", TopK(16), batch_size=5).open()
    with pytest.raises(CacheError) as problem:
        make_writer(tmp_path / "cache", TopK(17), batch_size=5).open()
    assert "goes on" not in str(problem.value)


@pytest.mark.parametrize("codec", [TopK(16), TopK(16, True), Sampled(20), Hidden()])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_head_that_makes_no_distribution_is_refused(tmp_path: Path, codec, value: float) -> None:
    """NaN was kept as if it were a distribution, and came to light as a loss, a night later."""
    model = make_model(seed=1)
    with torch.no_grad():
        model.get_output_embeddings().weight[7, 3] = value
    say, writer = speaker(make_model(seed=1)), make_writer(tmp_path / "cache", codec, model=model)
    with pytest.raises(CacheError, match="aren't finite"):
        writer.open()
        writer.begin()
        writer.write(lambda view: replace(say(view), head=writer.head))
    assert not list(tmp_path.glob("cache/part-*"))


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


def test_a_disk_that_is_full_at_the_end_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "0 shards that are missing" names no reason to make room."""
    codec = TopK(16)
    writer = make_writer(tmp_path / "cache", codec, model=(model := make_model(seed=1)))
    writer.open()
    writer.begin()
    writer.write(speaker(model))

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CacheError, match="all shards are written, and manifest.json.*couldn't be.*goes on"):
            writer.finish()
    assert Manifest.read(tmp_path / "cache").status == "building"
    build(tmp_path / "cache", codec)
    assert Manifest.read(tmp_path / "cache").status == "complete"


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


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where uncompressed copies lie, and none yet."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "copies")
    return tmp_path / "copies" / "hfkd_cache"


def test_what_is_read_is_what_was_checked(tmp_path: Path, copies: Path) -> None:
    """The shards were hashed, and rows were read from an unchecked copy: its damage taught without a word."""
    folder, text = tmp_path / "cache", next(iter(texts_of(make_dataset())))
    manifest = build(folder, Hidden())
    key, tokens = row_key(text["input_ids"], text["labels"]), sum(label != -100 for label in text["labels"][1:])

    def states() -> torch.Tensor:
        return CacheReader(folder, manifest).rows([key], [tokens], torch.device("cpu")).hidden.clone()

    before, (copy,) = states(), copies.glob("*.arrow")
    whole = copy.read_bytes()
    for damaged in (whole[:-1], bytes(byte ^ 1 for byte in whole), b""):
        copy.unlink()  # another file: the old one may still be mapped
        copy.write_bytes(damaged)
        assert torch.equal(states(), before)
        assert copy.read_bytes() == whole
    other = build(tmp_path / "other", Hidden(), model=make_model(seed=2))
    CacheReader(tmp_path / "other", other)
    assert len(list(copies.glob("*.arrow"))) == 2, "another cache has a copy of its own"
    assert torch.equal(states(), before)


def test_an_unchecked_copy_is_not_taken_for_a_checked_one(tmp_path: Path, copies: Path) -> None:
    """A run without hashes unpacked damaged shards, and a later one that hashes everything read its copy."""
    folder = tmp_path / "cache"
    manifest = build(folder, Hidden())
    build(tmp_path / "other", Hidden(), model=make_model(seed=2))
    whole, text = content(folder), next(iter(texts_of(make_dataset())))
    key, tokens = row_key(text["input_ids"], text["labels"]), sum(label != -100 for label in text["labels"][1:])

    def states(verify: bool) -> torch.Tensor:
        return CacheReader(folder, manifest, verify=verify).rows([key], [tokens], torch.device("cpu")).hidden.clone()

    for shard in manifest.shards:
        shutil.copy(tmp_path / "other" / shard["name"], folder)
    wrong = states(verify=False)
    with pytest.raises(CacheError, match="part-00000.parquet .* other bytes than the manifest says"):
        states(verify=True)
    for name, before in whole.items():
        (folder / name).write_bytes(before)
    assert torch.equal(states(verify=False), wrong), "who asks for no hashes is served from the copy"
    assert not torch.equal(states(verify=True), wrong)


def test_a_copy_that_finds_no_room_leaves_nothing(
    tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message must name the place that is full, which is not the folder of the cache."""
    manifest = build(tmp_path / "cache", TopK(16))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CacheError, match="copy .*hfkd_cache.*No space left.*HF_DATASETS_CACHE"):
        CacheReader(tmp_path / "cache", manifest)
    assert not list(copies.glob("*.arrow*"))


@pytest.mark.parametrize("damage", ["shard", "head", "torn head", "other shards", "other codec"])
def test_damage_is_named_without_hashes_too(tmp_path: Path, copies: Path, damage: str) -> None:
    """Who leaves out the hashing of terabytes got an error of Arrow's, or "16 rows, the manifest says 16"."""
    folder = tmp_path / "cache"
    manifest = build(folder, Hidden())
    words = {"shard": "lacks part-00001.parquet", "head": "lacks head.safetensors"}.get(
        damage, "anew with --overwrite"
    )
    if damage == "shard":
        (folder / "part-00001.parquet").unlink()
    elif damage == "head":
        (folder / "head.safetensors").unlink()
    elif damage == "torn head":
        (folder / "head.safetensors").write_bytes(b"x")
    else:
        codec = TopK(16) if damage == "other codec" else Hidden()
        theirs = build(tmp_path / "other", codec, dataset=make_dataset(ROWS[1:17]))
        for shard in theirs.shards:
            shutil.copy(tmp_path / "other" / shard["name"], folder)
        if damage == "other shards":
            assert theirs.build["tokens"] != manifest.build["tokens"]
            words = rf"16 rows with {theirs.build['tokens']} tokens, the manifest says 16 with \d+"
    with pytest.raises(CacheError, match=words):
        CacheReader(folder, manifest, verify=False)
