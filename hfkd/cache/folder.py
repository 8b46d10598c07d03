"""A cache's folder: which files in it are a build's own, how they are deleted, and that one build has it at a time.

Whatever else lies there is a user's, and is left alone.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hfkd.cache.format import MANIFEST_NAME, CacheError
from hfkd.files import held

LOCK_NAME = ".build.lock"
_NAMES = r"(manifest\.json|head\.safetensors|part-\d{5,}\.(parquet|json))"
_OWN_FILE = re.compile(rf"{_NAMES}|\.{_NAMES}\.draft-\d+")


def own_files(folder: Path) -> list[Path]:
    """The files that a build wrote into a folder, drafts of killed writes included; by their names alone."""
    return sorted(path for path in Path(folder).glob("*") if _OWN_FILE.fullmatch(path.name))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder while a cache is built in it; it is made if need be, and removed if nothing came of it.

    Raises:
        CacheError: Another build holds it, or a file lies where it should be.
    """
    folder = Path(folder)
    no_folder = CacheError(f"--out: {folder} is a file, or lies below one; expected a folder.")
    busy = CacheError(f"Another build runs in {folder}. Wait until it ends, or choose another folder.")
    with ExitStack() as afterwards, held(folder / LOCK_NAME, no_folder=no_folder, busy=busy):
        afterwards.callback(_remove_empty, folder)
        yield


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # something lies in it
        folder.rmdir()


def clear_cache(folder: Path) -> bool:
    """Delete what a build left in a folder; other files stay, the teacher's answers too.

    Returns:
        Whether there was something.

    Raises:
        CacheError: The files have a cache's names, and nothing shows that they are one's.
    """
    own = own_files(folder)
    named = [path for path in own if not path.name.startswith(".")]
    shards = [path for path in named if path.suffix == ".parquet"]
    if named and not _is_ours(Path(folder) / MANIFEST_NAME) and not (shards and all(map(_is_shard, shards))):
        raise CacheError(
            f"{folder} has {named[0].name}, and it can't be told that a cache is there (no {MANIFEST_NAME} of one, no "
            "shard of one), so nothing is deleted; give another folder, or delete the files yourself."
        )
    for path in own:
        path.unlink()
    return bool(own)


def remove_notes(folder: Path) -> None:
    """Delete what is needed only while a cache is built."""
    for path in own_files(folder):
        if path.suffix == ".json" and path.name != MANIFEST_NAME:
            path.unlink(missing_ok=True)
    remove_drafts(folder)


def remove_drafts(folder: Path) -> None:
    """Delete what writes that were killed have left."""
    for path in own_files(folder):
        if path.name.startswith("."):
            path.unlink(missing_ok=True)


def is_full(problem: OSError) -> bool:
    """Whether a write failed because there is no room."""
    return problem.errno in (errno.ENOSPC, errno.EDQUOT)


def size_in_words(count: float) -> str:
    """Bytes for a reader."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _is_ours(path: Path) -> bool:
    """Whether a file is a cache's manifest, of any version."""
    try:
        return "format_version" in json.loads(path.read_text(encoding="utf-8"))["contract"]
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _is_shard(path: Path) -> bool:
    """Whether a file is a shard of a cache."""
    try:
        return {"row_hash", "tokens"} <= set(pq.read_schema(path).names)
    except (OSError, pa.ArrowInvalid):
        return False
