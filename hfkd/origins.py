"""Where a model or rows come from: an id or a folder, the revision and the licence, as far as files or the hub say so.

A licence is what a card (`README.md`) says in its metadata, nothing else is taken for one. The commit of a model is
that of its files in the hub's cache on this machine. The hub is asked once, briefly: for the card where none lies
here, and for the commit of a data set; what can't be found out is None. Nothing here raises: a run must not fail
because nobody wrote a licence down.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hfkd.loading import commit_of
from hfkd.masking import shareable

_T = TypeVar("_T")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SNAPSHOT = re.compile(r"(models|datasets)--(?P<id>[\w.-]+)/snapshots/(?P<revision>[0-9a-f]{40})$")
_METADATA = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_COMMIT = re.compile("[0-9a-f]{40}")
_LONGEST_WAIT = 4.0
"""Seconds that the hub has to answer."""


def origin_of_model(
    name: str | Path, revision: str | None = None, config: Any = None, load_kwargs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Where a model comes from. Ask once it is loaded: then the commit that was taken is known.

    Args:
        name: A folder, or an id of the hub.
        revision: What was asked for: a commit, tag or branch.
        config: The loaded model's, which some releases of transformers write the commit into.
        load_kwargs: The other arguments that the model was loaded with.

    Returns:
        `id`, `source` ("hub" or "folder"), `revision` (the commit; of a model that isn't in the cache what was asked
        for) and `licence`, the last two None where they aren't known.
    """
    options = {**(load_kwargs or {}), "revision": revision}
    commit = getattr(config, "_commit_hash", None) or commit_of(str(name), options)
    return _origin(str(name), "model", revision, commit)


def origin_of_rows(path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Where rows come from.

    Args:
        path: As in `hfkd.data.load.Source`: a file, a folder, an address, an id of the hub, or `reasoning_gym:<task>`.
        revision: What was asked for, of a data set of the hub.

    Returns:
        As `origin_of_model`; `source` may be "file" or "generator" too. A file has the licence of the card beside it.
        The revision of a data set of the hub is the commit that the hub has for what was asked.
    """
    path = str(path)
    if path.startswith("reasoning_gym:"):
        return _said(path, "generator", None, None)
    if "://" in path:
        return _said(path, "file", None, None)
    commit = revision if _COMMIT.fullmatch(revision or "") else None
    return _origin(path, "dataset", revision, commit)


def _origin(name: str, kind: str, revision: str | None, commit: str | None) -> dict[str, Any]:
    """One answer of the hub has the card, and of a data set the commit; that of a model is what was loaded, which the
    hub doesn't know.
    """
    taken = commit or revision
    try:
        local = Path(name).expanduser()
        if local.exists():
            return _local(name, local, taken)
        if not _HUB_ID.fullmatch(name):
            return _said(name, "folder" if kind == "model" else "file", taken, None)
        cached = _cached_card(name, kind, taken)
        enough = cached is not None and (kind == "model" or commit is not None)
        found, metadata = (None if enough else _within(_LONGEST_WAIT, lambda: _asked(name, kind, taken))) or (None, {})
        if kind == "dataset":
            taken = commit or found or revision
        return _said(name, "hub", taken, licence_of(_metadata(cached) if cached else metadata))
    except Exception:  # whatever a hand-written card or a file system holds: it isn't known then
        return _said(name, "folder" if kind == "model" else "file", taken, None)


def _local(name: str, local: Path, revision: str | None) -> dict[str, Any]:
    """A file or folder; a snapshot in the hub's cache is what it is a snapshot of."""
    folder = local if local.is_dir() else local.parent
    licence = licence_of(_metadata(folder / "README.md"))
    if found := _SNAPSHOT.search(local.absolute().as_posix()):
        return _said(found["id"].replace("--", "/"), "hub", found["revision"], licence)
    return _said(name, "folder" if local.is_dir() else "file", revision, licence)


def _said(name: str, source: str, revision: str | None, licence: str | None) -> dict[str, Any]:
    return shareable({"id": name, "source": source, "revision": revision, "licence": licence})


def licence_of(metadata: Mapping[str, Any]) -> str | None:
    """The licence in a card's metadata: the hub's id, or the name of one that the hub has no id for."""
    licence = metadata.get("license")
    if isinstance(licence, list) and len(licence) == 1:
        licence = licence[0]
    if licence == "other":
        licence = metadata.get("license_name")
    if not isinstance(licence, str) or licence.strip().lower() in ("", "unknown", "other"):
        return None
    return " ".join(licence.split())


def _metadata(card: Path) -> dict[str, Any]:
    """What stands between the lines of dashes at the top of a card; empty where there is none to be read."""
    import yaml

    try:
        found = _METADATA.match(card.read_text(encoding="utf-8-sig"))
        read = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _cached_card(name: str, kind: str, revision: str | None) -> Path | None:
    """The card of a hub id in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "README.md", revision=revision, repo_type=kind)
    return Path(found) if isinstance(found, str) else None


def _asked(name: str, kind: str, revision: str | None) -> tuple[str | None, dict[str, Any]]:
    """The commit and the metadata that the hub has of an id; refused at once where the hub is switched off."""
    from huggingface_hub import HfApi

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    told = ask(name, revision=revision, timeout=_LONGEST_WAIT)
    return told.sha, told.card_data.to_dict() if told.card_data is not None else {}


def _within(seconds: float, ask: Callable[[], _T]) -> _T | None:
    """An answer that comes in time; None where it doesn't, or where asking fails. A look-up of a host's name knows no
    time limit of its own.
    """
    answers: list[_T] = []

    def asking() -> None:
        try:
            answers.append(ask())
        except Exception:  # offline, refused, gated, gone: all the same here, and no message may carry a token out
            return

    thread = threading.Thread(target=asking, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
