"""Checkpoints that are complete or not there: what they hold besides the student, how they are written and how one is
found that is whole.

One is written in a folder beside the others, listed with sizes and digests, brought to the disk and then renamed. It
knows folders and files, and of the parts of a training only that some have a state.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn

from hfkd import __version__
from hfkd.errors import CheckpointError
from hfkd.record import UNFINISHED, checkpoints
from hfkd.rollout.on_policy import Writer
from hfkd.teachers import Teacher

OBJECTIVE_FILE = "objective.safetensors"
TEACHER_FILE = "teacher.safetensors"
TEXTS_FILE = "texts.{process}.safetensors"
BESIDE = "decides_"  # what decides what is learned: by its place and its class
MANIFEST = "hfkd_checkpoint.json"
FORMAT = 1
_STATE = "trainer_state.json"  # the last file that Trainer writes
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Finding:
    """What a look at a checkpoint found.

    Attributes:
        kind: `whole`; `unverified`, complete as far as can be seen without a manifest; `damaged`; or `newer`, written
            in a format that this version doesn't know.
        reason: In words, unless it is whole.
        manifest: What it says of itself; empty without one.
    """

    kind: Literal["whole", "unverified", "damaged", "newer"]
    reason: str = ""
    manifest: Mapping[str, Any] | None = None


# --- the states beside the student


def save_companions(
    folder: str,
    objective: nn.Module,
    teacher: Teacher | None,
    writer: Writer | None = None,
    first: bool = True,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Write what has a state: the first process what all share, and each its own texts.

    Args:
        folder: Of the checkpoint.
        objective: Its losses may hold parameters.
        teacher: May hold a state.
        writer: May keep texts.
        first: Whether this process writes what all share.
        beside: More owners of a state that all share, by the name of their file.
    """
    for name, owner in _owners(objective, teacher, writer, beside):
        state = owner.state_dict()
        if state and (first or owner is writer):
            Path(folder).mkdir(parents=True, exist_ok=True)  # another process may be here first
            save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, Path(folder) / name)


def load_companions(
    folder: str,
    objective: nn.Module,
    teacher: Teacher | None,
    writer: Writer | None = None,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Take back what `save_companions` wrote.

    Raises:
        CheckpointError: Something here has a state, but the checkpoint holds none: it was made with other parts, or
            on another number of processes, or keeps the model only.
    """
    for name, owner in _owners(objective, teacher, writer, beside):
        if not owner.state_dict():
            continue
        file = Path(folder) / name
        if not file.exists():
            if owner is writer and getattr(writer, "buffer", writer) is None:
                continue  # only counts for warnings, which begin anew
            processes = PartialState().num_processes
            texts = f", on the number of processes that it was made with (here {processes})" if owner is writer else ""
            raise CheckpointError(
                f"{folder} has no {name}, but {type(owner).__name__} has a state to restore. Resume with the "
                f"objective, the teacher, the buffer, the sampler and the revisers that the checkpoint was made "
                f"with{texts}, or start anew."
            )
        owner.load_state_dict(load_file(file))
    known = {f"{name}.safetensors" for name in beside or {}}
    if strangers := {path.name for path in Path(folder).glob(f"{BESIDE}*.safetensors")} - known:
        raise CheckpointError(
            f"{folder} has {', '.join(sorted(strangers))}, and this training has no such part. Resume with the "
            "sampler and the revisers that the checkpoint was made with, or start anew."
        )


def _owners(
    objective: nn.Module, teacher: Teacher | None, writer: Writer | None, beside: Mapping[str, Any] | None
) -> Iterator[tuple[str, Any]]:
    yield OBJECTIVE_FILE, objective
    if teacher is not None:
        yield TEACHER_FILE, teacher
    if writer is not None:
        yield TEXTS_FILE.format(process=PartialState().process_index), writer
    yield from ((f"{name}.safetensors", owner) for name, owner in (beside or {}).items())


# --- writing one


def publish(draft: Path, final: Path, about: Mapping[str, Any]) -> None:
    """Give a written checkpoint its manifest, bring it to the disk, and move it to its place in one step.

    Args:
        draft: The folder that it was written into, on the same file system, with all its files.
        final: Its place. What lies there is of an earlier attempt, and is removed when the new one is in its place.
        about: What else the manifest says.

    Raises:
        OSError: The disk is full, or a file can't be read or moved.
    """
    files = {}
    for path in sorted(draft.rglob("*")):
        if path.is_file():
            files[path.relative_to(draft).as_posix()] = {"size": path.stat().st_size, "xxh3_128": _digest(path)}
            _to_disk(path)
    manifest = {"format": FORMAT, "hfkd": __version__, "written": time.time(), **about, "files": files}
    manifest["xxh3_128"] = _digest_of(manifest)
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _to_disk(draft / MANIFEST)
    for folder in [*(path for path in draft.rglob("*") if path.is_dir()), draft]:
        _to_disk(folder)
    away = _put_away(final) if final.exists() else None
    os.replace(draft, final)
    _to_disk(final.parent)
    if away is not None:
        shutil.rmtree(away, ignore_errors=True)
    with suppress(OSError):
        draft.parent.rmdir()


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint so that no half of it is ever taken for a whole one: away with it first, then its files."""
    away = _put_away(checkpoint)
    shutil.rmtree(away, ignore_errors=True)
    with suppress(OSError):
        away.parent.rmdir()  # unless something else is under way in it


def rotate(folder: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Remove the oldest checkpoints. The newest and the best one stay, whatever the limit.

    Args:
        folder: Of the run.
        limit: How many stay; None or 0 keeps all.
        newest: The one that was just written. Those of later steps are of a course that was left, and go first.
        best: The path of the best one, if there is one.
    """
    if not limit or limit < 0:
        return
    protected = {newest.resolve(), *([Path(best).resolve()] if best else [])}
    step, found = _step(newest), checkpoints(folder)
    removable = [path for path in found if path.resolve() not in protected]
    surplus = len(found) - max(limit, len(found) - len(removable))
    for path in sorted(removable, key=lambda one: (_step(one) <= step, _step(one)))[: max(0, surplus)]:
        discard(path)


def _put_away(checkpoint: Path) -> Path:
    away = checkpoint.parent / UNFINISHED / f"old-{checkpoint.name}"
    away.parent.mkdir(exist_ok=True)
    shutil.rmtree(away, ignore_errors=True)
    os.replace(checkpoint, away)
    return away


def clear_unfinished(folder: Path) -> list[str]:
    """Remove what a run that was killed left half-written or half-removed, and move to its place what only that was
    missing of; returns what was done with each, by name.
    """
    unfinished, done = folder / UNFINISHED, []
    with suppress(FileNotFoundError):  # there is none, or another process was faster
        for draft in sorted(unfinished.iterdir()):
            final = folder / draft.name
            if draft.name.startswith("checkpoint-") and not final.exists() and inspect(draft).kind == "whole":
                os.replace(draft, final)
                done.append(f"{draft.name} (whole, moved to its place)")
            else:
                done.append(f"{draft.name} (removed)")
    shutil.rmtree(unfinished, ignore_errors=True)
    return done


# --- finding one


def inspect(checkpoint: Path, digests: bool = True) -> Finding:
    """Hold a checkpoint against its manifest.

    Args:
        checkpoint: Its folder.
        digests: Whether to read all its bytes; else the sizes are compared.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        version = int(manifest["format"])
        if version > FORMAT:
            made_by = f"hfkd {manifest.get('hfkd', 'of a newer version')}"
            return Finding("newer", f"it was written by {made_by} in format {version}; this one reads up to {FORMAT}")
        files = {name: (int(wanted["size"]), str(wanted["xxh3_128"])) for name, wanted in manifest["files"].items()}
    except FileNotFoundError:
        return _without_manifest(checkpoint)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return Finding("damaged", f"its {MANIFEST} can't be read ({type(error).__name__})")
    if manifest.get("xxh3_128") != _digest_of(manifest):
        return Finding("damaged", f"its {MANIFEST} says other things than were written")
    for name, (size, digest) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return Finding("damaged", f"{name} is missing")
        if path.stat().st_size != size:
            return Finding("damaged", f"{name} has {path.stat().st_size} bytes instead of {size}")
        if digests and _digest(path) != digest:
            return Finding("damaged", f"{name} holds other bytes than were written")
    return Finding("whole", manifest=manifest)


def has_optimizer(checkpoint: Path) -> bool:
    """Whether it holds more than the model: a file of Trainer or FSDP, or a folder of FSDP's or DeepSpeed's shards."""
    return any(checkpoint.glob("optimizer*")) or any(checkpoint.glob("global_step*"))


def of_last_course(folder: Path) -> list[Path]:
    """The checkpoints that lead to the one that was written last, oldest first: without those of another run in the
    same folder, or of later steps from which a resume went back. Whose manifest can't be read may be any.

    Args:
        folder: Of the runs.
    """
    found, told = checkpoints(folder), {}
    for path in found:
        with suppress(OSError, ValueError, LookupError, TypeError):
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            told[path] = (float(manifest["written"]), str(manifest["course"]))
    leading: list[Path] = []
    for path in sorted(told, key=told.__getitem__, reverse=True):
        if not leading or (told[path][1] == told[leading[0]][1] and _step(path) < _step(leading[-1])):
            leading.append(path)
    return [path for path in found if path in leading or path not in told]


def last_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there with their sizes, for a message; their bytes aren't read."""
    found = (path for path in reversed(of_last_course(folder)) if inspect(path, digests=False).kind == "whole")
    return next(found, None)


def check_same_training(checkpoint: Path, made: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Refuse to go on from a checkpoint whose steps were others: its count of steps would stand for other rows.

    Args:
        checkpoint: For the message.
        made: Its manifest.
        now: The same entries of the training that wants to go on.

    Returns:
        What won't be exactly as it would have been, for a warning; None where all is the same.

    Raises:
        CheckpointError: Other data, another number of rows a step, or other shards; says which.
    """
    if made["sharding"] != now["sharding"]:
        raise CheckpointError(
            f"{checkpoint} was written with sharding {made['sharding']!r}, and this run has {now['sharding']!r}: the "
            "files of one can't be read into the other. Launch as before (the accelerate config), or start a new run "
            "from the weights."
        )
    for part in ("objective", "teacher"):
        if part in made and made[part] != now[part]:
            raise CheckpointError(
                f"The {part} isn't the one that {checkpoint} was made with (was {json.dumps(made[part])}, is "
                f"{json.dumps(now[part])}). Go on with that one, or start a new run from the weights."
            )
    names = ("processes", "batch", "accumulation")
    before, here = ([entries[name] for name in names] for entries in (made, now))
    if math.prod(before) != math.prod(here):
        raise CheckpointError(
            f"A step of {checkpoint} had {math.prod(before)} rows ({_product(before)}), and one of this run has "
            f"{math.prod(here)} ({_product(here)}): its place in the data, its schedules and its learning rate count "
            "steps. Change per_device_train_batch_size or gradient_accumulation_steps so that the product is the "
            "same, or start a new run from the weights."
        )
    if made["data"] != now["data"]:
        raise CheckpointError(
            f"The training data aren't those that {checkpoint} was made with ({_in_words(made['data'])}; now "
            f"{_in_words(now['data'])}), so its place in them means nothing. Bring the rows back as they were, in "
            "their order, or start a new run from the weights (or pass ignore_data_skip=True to go on at the "
            "beginning of other data)."
        )
    if before == here:
        return None
    if now["sharding"] == "deepspeed" and before[0] != here[0]:
        raise CheckpointError(
            f"{checkpoint} was written by {before[0]} processes of DeepSpeed, and here are {here[0]}: each reads its "
            "own shards. Launch as many, or start a new run from the weights."
        )
    return (
        f"{checkpoint.name} was made as {_product(before)}, and this run goes on as {_product(here)}: the same rows a "
        "step, so it goes on with the right ones, but random numbers (dropout) and the order of sums are others, so "
        "the weights won't be the same to the last bit."
    )


def _product(numbers: list[int]) -> str:
    processes, batch, accumulation = numbers
    return f"{processes} process{'es' * (processes > 1)} x batch {batch} x accumulation {accumulation}"


def _in_words(data: Mapping[str, Any]) -> str:
    digest = str(data.get("sha256", ""))[:12]
    return f"{data.get('examples', 'an unknown number of')} examples{f', fingerprint {digest}' if digest else ''}"


def _without_manifest(checkpoint: Path) -> Finding:
    """Those of an older hfkd have none; but then nor have those before it."""
    if not checkpoint.is_dir():
        return Finding("damaged", "there is no such folder")
    try:
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Finding("damaged", f"it has neither a {MANIFEST} nor a {_STATE} that can be read")
    beside = checkpoints(checkpoint.parent)
    for other in beside[: beside.index(checkpoint)] if checkpoint in beside else []:
        if (other / MANIFEST).exists():
            return Finding("damaged", f"it has no {MANIFEST}, which {other.name} before it has")
    return Finding("unverified", f"it has no {MANIFEST}: it was written by an older hfkd or by Trainer itself")


# --- files


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _digest_of(manifest: Mapping[str, Any]) -> str:
    """Of all that it says but this."""
    rest = {key: value for key, value in manifest.items() if key != "xxh3_128"}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk; some systems can't do it for folders."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise
