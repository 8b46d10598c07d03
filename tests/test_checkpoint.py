"""What lies beside the student in a checkpoint, and what is said where it doesn't; how one is written, found and
removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

import hfkd.checkpoint
from hfkd.checkpoint import (
    MANIFEST,
    check_same_training,
    clear_unfinished,
    discard,
    inspect,
    last_whole,
    load_companions,
    of_last_course,
    publish,
    rotate,
    save_companions,
)
from hfkd.errors import CheckpointError
from hfkd.record import UNFINISHED, checkpoints


class Kept(nn.Module):
    """An owner of one tensor."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    """A part that is written and not read begins anew in silence."""
    made, found = ([Kept(value + place) for place in range(3)] for value in (1.0, 0.0))
    save_companions(str(tmp_path), *made)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("objective.safetensors", "teacher.safetensors", "texts.0.safetensors"),
    }
    load_companions(str(tmp_path), *found)
    assert [float(one.value.detach()) for one in found] == [1.0, 2.0, 3.0]
    load_companions(str(tmp_path / "none"), nn.Module(), None)


def test_a_part_that_is_not_there_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to take the same teacher, who has the same teacher looks for the fault everywhere but in the number of
    processes.
    """
    nothing = nn.Module()
    with pytest.raises(CheckpointError, match=r"no teacher.safetensors, but Kept has.*or start anew") as caught:
        load_companions(str(tmp_path), nothing, Kept(1.0))
    assert "processes" not in str(caught.value)
    save_companions(str(tmp_path), nothing, None, Kept(1.0))
    monkeypatch.setattr(hfkd.checkpoint, "PartialState", lambda: SimpleNamespace(process_index=1, num_processes=2))
    with pytest.raises(CheckpointError, match=r"no texts.1.safetensors.*number of processes .*made with \(here 2\)"):
        load_companions(str(tmp_path), nothing, None, Kept(1.0))


ABOUT = {
    "step": 5,
    "processes": 2,
    "batch": 4,
    "accumulation": 3,
    "sharding": "none",
    "data": {"examples": 9},
    "teacher": {"kind": "self"},
}


def made(folder: Path, step: int, text: str = "weights", course: str = "only") -> Path:
    """A small checkpoint, written as a trainer writes it."""
    draft = folder / UNFINISHED / f"checkpoint-{step}"
    (draft / "inner").mkdir(parents=True)
    (draft / "model.safetensors").write_text(text)
    (draft / "inner" / "shard.bin").write_bytes(bytes(range(100)))
    (draft / "trainer_state.json").write_text("{}")
    publish(draft, folder / f"checkpoint-{step}", {**ABOUT, "course": course})
    return folder / f"checkpoint-{step}"


def test_a_checkpoint_is_there_when_all_of_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is moved before it is on the disk is, after a power cut, a folder of empty files with the right name."""
    events: list[str] = []
    to_disk, replace = hfkd.checkpoint._to_disk, os.replace
    monkeypatch.setattr(hfkd.checkpoint, "_to_disk", lambda path: (events.append(str(path)), to_disk(path)))
    monkeypatch.setattr(os, "replace", lambda one, other: (events.append("moved"), replace(one, other)))
    draft = tmp_path / UNFINISHED / "checkpoint-5"
    checkpoint = made(tmp_path, 5)
    before = events[: events.index("moved")]
    names = ("model.safetensors", "inner/shard.bin", "trainer_state.json", MANIFEST, "inner")
    assert {str(draft), *(str(draft / name) for name in names)} == set(before)
    assert events[-1] == str(tmp_path), "the name itself has to get to the disk too"
    finding = inspect(checkpoint)
    assert finding.kind == "whole" and finding.manifest["processes"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_draft_is_no_checkpoint(tmp_path: Path) -> None:
    """A run that was killed while it wrote would be resumed from half a model."""
    made(tmp_path, 5)
    (tmp_path / UNFINISHED / "checkpoint-10").mkdir(parents=True)
    (tmp_path / UNFINISHED / "checkpoint-10" / "model.safetensors").write_text("hal")
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-5")
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-5"] == [last_whole(tmp_path)]
    assert clear_unfinished(tmp_path) == ["checkpoint-10 (removed)"] and clear_unfinished(tmp_path) == []
    assert not (tmp_path / UNFINISHED).exists()


def test_a_failed_publish_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that replaces an older attempt must not remove it before the new one can take its place."""
    made(tmp_path, 5, "first")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hfkd.checkpoint, "_to_disk", full)
    with pytest.raises(OSError, match="No space left"):
        made(tmp_path, 5, "second")
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-5" / "model.safetensors").read_text() == "first"
    shutil.rmtree(tmp_path / UNFINISHED)
    made(tmp_path, 5, "third")
    assert (tmp_path / "checkpoint-5" / "model.safetensors").read_text() == "third"
    assert inspect(tmp_path / "checkpoint-5").kind == "whole" and not (tmp_path / UNFINISHED).exists()


def test_a_replacement_that_breaks_off_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the old one's leaving and the new one's coming a kill would cost both."""
    made(tmp_path, 5, "first")
    moves, replace = [], os.replace

    def killed(one: Path, other: Path) -> None:
        moves.append(other)
        if len(moves) == 2:
            raise KeyboardInterrupt
        replace(one, other)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, 5, "second")
    monkeypatch.undo()
    assert checkpoints(tmp_path) == []
    words = ["checkpoint-5 (whole, moved to its place)", "old-checkpoint-5 (removed)"]
    assert clear_unfinished(tmp_path) == words
    assert (tmp_path / "checkpoint-5" / "model.safetensors").read_text() == "second"
    assert inspect(tmp_path / "checkpoint-5").kind == "whole" and not (tmp_path / UNFINISHED).exists()


def test_the_course_that_wrote_last_is_gone_on_from(tmp_path: Path) -> None:
    """Of two runs in one folder the older one may have come further; so may one that was gone back in."""
    for course, step in [*(("first", step) for step in (5, 10, 15, 20)), ("second", 5), ("second", 10)]:
        made(tmp_path, step, course=course)
    assert of_last_course(tmp_path) == [tmp_path / "checkpoint-5", tmp_path / "checkpoint-10"]
    assert last_whole(tmp_path) == tmp_path / "checkpoint-10"
    made(tmp_path, 5, course="second")
    (tmp_path / "checkpoint-20" / MANIFEST).write_text("[]")
    assert [path.name for path in of_last_course(tmp_path)] == ["checkpoint-5", "checkpoint-20"]


def cut(checkpoint: Path) -> None:
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.truncate(3)


def flip(checkpoint: Path) -> None:
    path = checkpoint / "inner" / "shard.bin"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)


def tell(checkpoint: Path, **other: object) -> None:
    """Let a manifest say something else."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({**manifest, **other}))


DAMAGE = {
    "cut": (cut, "model.safetensors has 3 bytes instead of 7"),
    "flipped": (flip, "inner/shard.bin holds other bytes than were written"),
    "missing": (lambda one: (one / "inner" / "shard.bin").unlink(), "inner/shard.bin is missing"),
    "half a manifest": (lambda one: (one / MANIFEST).write_text('{"format'), f"its {MANIFEST} can't be read"),
    "no manifest": (lambda one: (one / MANIFEST).unlink(), "which checkpoint-5 before it has"),
    "a list": (lambda one: (one / MANIFEST).write_text("[]"), f"its {MANIFEST} can't be read"),
    "a format in letters": (lambda one: tell(one, format="one"), f"its {MANIFEST} can't be read"),
    "no sizes": (lambda one: tell(one, files={"trainer_state.json": None}), f"its {MANIFEST} can't be read"),
    "other words": (lambda one: tell(one, batch=8), f"its {MANIFEST} says other things than were written"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    """Weights that are nearly right train on without a word."""
    made(tmp_path, 5)
    checkpoint = made(tmp_path, 10)
    assert inspect(checkpoint).kind == "whole"
    harm, words = DAMAGE[kind]
    harm(checkpoint)
    finding = inspect(checkpoint)
    assert finding.kind == "damaged" and words in finding.reason
    assert last_whole(tmp_path) == tmp_path / ("checkpoint-10" if kind == "flipped" else "checkpoint-5")


def test_of_another_version(tmp_path: Path) -> None:
    """What a newer version wrote may mean something else; what an older one wrote has no manifest, and no damage."""
    checkpoint = made(tmp_path, 5)
    tell(checkpoint, format=2, hfkd="9.0")
    assert inspect(checkpoint).kind == "newer" and "hfkd 9.0 in format 2" in inspect(checkpoint).reason
    (checkpoint / MANIFEST).unlink()
    assert inspect(checkpoint).kind == "unverified"
    made(tmp_path, 10)
    assert inspect(checkpoint).kind == "unverified", "it is older than the first one that has a manifest"
    (checkpoint / "trainer_state.json").unlink()
    assert inspect(checkpoint).kind == "damaged"


@pytest.mark.parametrize(
    ("limit", "newest", "best", "left"),
    [
        (None, 30, None, [10, 20, 30, 40]),
        (2, 40, None, [30, 40]),
        (1, 40, None, [40]),
        (1, 40, 10, [10, 40]),
        (2, 40, 10, [10, 40]),
        (3, 40, 10, [10, 30, 40]),
        (2, 30, None, [20, 30]),  # 40 is of a course that was left
        (2, 40, 40, [30, 40]),
    ],
)
def test_old_checkpoints_go(tmp_path: Path, limit: int | None, newest: int, best: int | None, left: list[int]) -> None:
    """A best or newest checkpoint that is removed can't be gone on from; too many fill the disk."""
    for step in (10, 20, 30, 40):
        made(tmp_path, step)
    rotate(tmp_path, limit, tmp_path / f"checkpoint-{newest}", str(tmp_path / f"checkpoint-{best}") if best else None)
    assert [path.name for path in tmp_path.iterdir() if path not in checkpoints(tmp_path)] == []
    assert checkpoints(tmp_path) == [tmp_path / f"checkpoint-{step}" for step in left]


def test_a_removal_that_breaks_off_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed while it removes a checkpoint would find half of one."""
    checkpoint = made(tmp_path, 5)

    def killed(*args, **kwargs):
        if (tmp_path / UNFINISHED / "old-checkpoint-5").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        discard(checkpoint)
    assert checkpoints(tmp_path) == [] and get_last_checkpoint(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"processes": 1, "batch": 8}, "2 processes x batch 4 x accumulation 3.* as 1 process x batch 8 .*last bit"),
        ({"processes": 4, "batch": 2}, "the same rows a step"),
        ({"processes": 1}, "had 24 rows .* this run has 12 .*so that the product is the same"),
        ({"sharding": "fsdp"}, "written with sharding 'none', and this run has 'fsdp'"),
        ({"teacher": {"kind": "ema"}}, """The teacher isn't the one .*was {"kind": "self"}, is {"kind": "ema"}"""),
        ({"data": {"examples": 8}}, r"aren't those .*9 examples; now 8 examples.*ignore_data_skip"),
    ],
)
def test_another_training_is_not_gone_on_with(changes: dict, words: str | None) -> None:
    """A step count stands for other rows when a step has another number of them."""
    if words is None or ("same rows" in words or "last bit" in words):
        note = check_same_training(Path("checkpoint-5"), ABOUT, {**ABOUT, **changes})
        assert (note is None) if words is None else re.search(words, note)
        return
    with pytest.raises(CheckpointError, match=words):
        check_same_training(Path("checkpoint-5"), ABOUT, {**ABOUT, **changes})


def test_deepspeed_reads_its_own_shards(tmp_path: Path) -> None:
    """Its files are one for each process; another number of processes would find too few or too many."""
    about = {**ABOUT, "sharding": "deepspeed"}
    with pytest.raises(CheckpointError, match="written by 2 processes of DeepSpeed, and here are 4"):
        check_same_training(Path("checkpoint-5"), about, {**about, "processes": 4, "batch": 2})
