"""Files that are there whole or not at all: nobody reads half of one, and a failure keeps the one before. And what
tells one file from another, and who may write into a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout


def write_whole(path: str | Path, content: bytes | str | Callable[[BinaryIO], Any]) -> Path:
    """Write under another name in the same folder, and move it into its place when it lies on the disk.

    Args:
        path: The file; its folder is made if need be.
        content: Its bytes, its text (written as UTF-8), or what writes it into a stream of bytes.

    Returns:
        The path.

    Raises:
        OSError: It can't be written; nothing is left of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    try:
        with draft.open("wb") as stream:
            if callable(content):
                content(stream)
            else:
                stream.write(content.encode("utf-8") if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, content: Any) -> Path:
    """Write plain data as JSON, whole or not at all; what JSON has no word for is written as its text.

    Args:
        path: The file.
        content: JSON values, or what `str` can turn into one.

    Returns:
        The path.
    """
    return write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def try_folder(folder: str | Path) -> None:
    """Try whether files can be written into a folder, or into the one that it would be made in; leaves nothing.

    Args:
        folder: It need not exist.

    Raises:
        OSError: They can't.
    """
    nearest = Path(folder).absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    with tempfile.TemporaryFile(dir=nearest):
        pass


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hex digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def held(lock: Path, *, no_folder: Exception, busy: Exception) -> Iterator[None]:
    """Hold a folder against other processes while it is written; it is made if need be.

    Args:
        lock: The file that says so, in that folder; gone afterwards.
        no_folder: Raised where a file lies in the folder's place, or in one above it.
        busy: Raised where another process holds it.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise no_folder from None
    holder = FileLock(lock)
    try:
        holder.acquire(timeout=0)
    except Timeout:
        raise busy from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        holder.release()
