"""A teacher's cache as a data set of the hub, whose viewer shows its rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfkd.cache import CacheError, Manifest
from hfkd.cache.format import HEAD_NAME, MANIFEST_NAME
from hfkd.card import is_untouched
from hfkd.card.marker import marked
from hfkd.uploads import Sent, Target, Upload, check, collect, masked_text, send

ANSWERS_NAME = "teacher_answers.jsonl"
"""What the teacher wrote, with the prompts: without it, the cache of such a teacher serves nobody."""
_TITLE = "# Cached teacher\n"
_OWNED = ("part-[0-9][0-9][0-9][0-9][0-9]*.parquet", HEAD_NAME, ANSWERS_NAME)


def cache_target(folder: str | Path, repo_id: str, chosen: bool = True) -> Target:
    """What a repository is to hold of a finished cache; nothing is written into the folder.

    Args:
        folder: The cache.
        repo_id: owner/name.
        chosen: Whether a user chose that name; if not, only a repository that holds a cache is written to.

    Raises:
        CacheError: The cache isn't finished, or a part of it is missing.
        ValueError: A file is damaged, or holds what may not be uploaded.
    """
    folder, manifest = Path(folder), Manifest.read(Path(folder))
    if manifest.status != "complete":
        raise CacheError(f"The cache in {folder} isn't finished; run `hfkd cache` again before --push.")
    shards = [shard["name"] for shard in manifest.shards]
    uploads = collect(folder, [*shards, MANIFEST_NAME, HEAD_NAME, ANSWERS_NAME])
    if missing := sorted(set(shards) - {one.path for one in uploads}):
        raise CacheError(f"{folder} lacks {missing[0]}; run `hfkd cache` again before --push.")
    card = Upload("README.md", marked(masked_text(dataset_card(manifest)).rstrip("\n")).encode())
    whose = {} if chosen else {"mark": _TITLE, "option": "--cache-repo OWNER/NAME"}
    return Target(repo_id, [card, *uploads], kind="dataset", owned=_OWNED, is_made=is_untouched, **whose)


def check_cache_push(repo_id: str, private: bool = True) -> None:
    """Find out before hours of building whether `push_cache` could work: the name, the token, who can read it.

    Args:
        repo_id: As in `push_cache`.
        private: As in `push_cache`.

    Raises:
        ValueError: As in `push_cache`.
        HubError: As in `push_cache`.
    """
    check([Target(repo_id, kind="dataset")], private=private)


def push_cache(
    folder: str | Path, repo_id: str, private: bool = True, say: Callable[[str], None] = lambda text: None
) -> Sent:
    """Send a finished cache to the hub, as a data set whose viewer shows its rows; the files of a cache that was there
    before are deleted. Nothing is written into the folder.

    Args:
        folder: The cache.
        repo_id: owner/name.
        private: Whether a repository that is made for it is private; one that is public is refused.
        say: Hears, line by line, what happens.

    Raises:
        CacheError: The cache isn't finished.
        ValueError: The name can't be one, the repository is public, or a file holds what may not be uploaded.
        HubError: The hub or the network refuses.
    """
    return send(
        [cache_target(folder, repo_id)], private=private, message="Upload a teacher's cache with hfkd", say=say
    )[0]


def dataset_card(manifest: Manifest) -> str:
    """The README of a cache on the hub; its header tells the viewer which files are rows."""
    contract, build = manifest.contract, manifest.build
    teacher, code = contract["teacher"], ", ".join(f"{name} {value}" for name, value in contract["codec"].items())
    head = ["---", "configs:", "- config_name: default", "  data_files: part-*.parquet", "tags:", "- hfkd"]
    revision = teacher.get("commit") or teacher["revision"]
    named = teacher["dtype"] if revision is None else f"revision {revision}, {teacher['dtype']}"
    facts = {
        "Teacher": f"{teacher['model']} ({named})",
        "Texts": build["rows"],
        "Supervised tokens": build["tokens"],
        "Code": code,
        "Temperature": contract["temperature"] or "any",
        "Vocabulary": contract["vocab_size"],
        "Bytes per token": manifest.facts["bytes_per_token"],
        "Error": manifest.facts["error"],
    }
    lines = [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    text = (
        "What a language model said of each supervised token of a data set, for distillation without the model. Rows "
        "are found by the hash of a text's tokens (`row_hash`); the texts themselves are not here. `manifest.json` "
        "says what the cache was made of, and a run that expects something else is refused."
    )
    return "\n".join([*head, "- distillation", "---", "", _TITLE, text, "", "| | |", "|---|---|", *lines, ""])


def _cell(value: Any) -> str:
    """A value in a table, where a bar would end the cell."""
    return str(value).replace("|", r"\|")
