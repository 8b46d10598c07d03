"""A teacher's cache as a data set of the hub, whose viewer shows its rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfkd.cache import CacheError, Manifest
from hfkd.cache.format import HEAD_NAME, MANIFEST_NAME
from hfkd.uploads import Sent, Target, Upload, collect, send

ANSWERS_NAME = "teacher_answers.jsonl"
"""What the teacher wrote, with the prompts: without it, the cache of such a teacher serves nobody."""
_OWNED = ("part-[0-9][0-9][0-9][0-9][0-9]*.parquet", HEAD_NAME, ANSWERS_NAME)


def cache_target(folder: str | Path, repo_id: str) -> Target:
    """What a repository is to hold of a finished cache; nothing is written into the folder.

    Args:
        folder: The cache.
        repo_id: owner/name.

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
    card = Upload("README.md", dataset_card(manifest).encode())
    return Target(repo_id, [card, *uploads], kind="dataset", owned=_OWNED)


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
    return "\n".join(
        [*head, "- distillation", "---", "", "# Cached teacher", "", text, "", "| | |", "|---|---|", *lines, ""]
    )


def _cell(value: Any) -> str:
    """A value in a table, where a bar would end the cell."""
    return str(value).replace("|", r"\|")
