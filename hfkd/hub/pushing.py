"""`push`: a run's folder as a repository of the hub. What goes there is planned, gone over and shown before anything
is sent; how it is sent is `hfkd.uploads`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from hfkd.cache.folder import size_in_words
from hfkd.hub.caches import cache_target
from hfkd.hub.merging import write_merged
from hfkd.uploads import (
    ADAPTER_CONFIG,
    INDEX,
    RUN,
    TOKENIZER,
    WEIGHTS,
    Base,
    Sent,
    Target,
    Upload,
    adapter_config_for,
    check,
    check_repo_id,
    collect,
    find_base,
    masked_text,
    send,
)

CARD = "README.md"
_ADAPTER = "adapter_model.safetensors"
_WHOLE = tuple(name for name in WEIGHTS if not name.startswith("adapter_"))
_RECORDS = tuple(name for name in RUN if name != CARD)
_SHOWN = 12


@dataclass
class Push:
    """What was sent, or would be.

    Attributes:
        targets: The repositories and their files, in the order in which they are sent.
        sent: What became of each; empty after a dry run.
        notes: What a user should know of it.
    """

    targets: list[Target]
    sent: list[Sent] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    merged: bool = False,
    base: str | None = None,
    cache: str | Path | None = None,
    cache_repo: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    console: Console | None = None,
) -> Push:
    """Send a run's weights, tokenizer, card, records and pictures to the hub, in one commit; its cache too, if asked;
    and a base that was cut out of a larger model, into a repository with `-base` behind the name.

    Args:
        folder: Of a run; it isn't changed.
        repo_id: owner/name; made where it isn't there.
        private: Whether repositories that are made are private; one that is public already is refused.
        merged: Send the adapter and its base as one whole model.
        base: The id on the hub of the model under the adapter, where `adapter_config.json` names a folder.
        cache: The folder of a teacher's cache, to send as a data set.
        cache_repo: The data set's owner/name; None adds `-cache` to `repo_id`.
        dry_run: Say what would be sent, and ask the network nothing.
        token: None takes that of HF_TOKEN or of `hf auth login`.
        revision: A branch, which is made where it isn't there; None is the main one.
        message: Of the commit.
        console: Where it prints; None prints to the terminal.

    Raises:
        ValueError: A name can't be one, there are no weights, a file holds what may not be uploaded, or the repository
            is public and `private` is on.
        OSError: A file can't be read; or, as a `HubError`, the hub or the network refuses.
    """
    folder, console = Path(folder), console or Console()
    cache_repo = cache_repo or (f"{repo_id}-cache" if cache is not None else None)
    for name in filter(None, (repo_id, cache_repo, base)):
        check_repo_id(name)
    if merged and not dry_run:
        check([Target(repo_id)], private=private, token=token)  # merging takes a while
    with tempfile.TemporaryDirectory() as scratch, _plan(folder, repo_id, merged, base, Path(scratch)) as plan:
        if cache is not None:
            plan.targets.append(cache_target(cache, cache_repo))
        for line in plan_lines(plan, folder, private, dry_run):
            _say(console, line)
        if not dry_run:
            options = {"private": private, "token": token, "revision": revision, "message": message}
            plan.sent = send(plan.targets, **options, say=lambda line: _say(console, line))
            for sent in plan.sent:
                _say(console, f"{sent.url}: {'uploaded' if sent.changed else 'all of it was there already'}.")
    return plan


def check_push(repo_id: str, *, private: bool = True, token: str | None = None) -> None:
    """Find out before hours of training whether a push at their end could work: the name, the token, who can read it.

    Args:
        repo_id: As in `push`.
        private: As in `push`.
        token: As in `push`.

    Raises:
        ValueError: As in `push`.
        OSError: As in `push`.
    """
    check([Target(repo_id)], private=private, token=token)


def plan_push(
    folder: str | Path,
    *,
    merged: bool = False,
    repo_id: str = "owner/name",
    base: str | None = None,
    scratch: Path | None = None,
) -> list[Upload]:
    """The files that `push` would send to the model's repository, each with `path` and `size`.

    Args:
        folder: Of a run.
        merged: As in `push`; needs `scratch`.
        repo_id: As in `push`.
        base: As in `push`.
        scratch: An empty folder, where a merged model is written and stays.

    Raises:
        ValueError: As in `push`.
    """
    if merged and scratch is None:
        raise ValueError("plan_push: merged is on and scratch is None; give an empty folder for the merged weights.")
    with _plan(Path(folder), repo_id, merged, base, scratch or Path()) as plan:
        return list(plan.targets[-1].uploads)


def plan_lines(plan: Push, folder: Path, private: bool, dry_run: bool) -> list[str]:
    """What goes where, file by file, for a terminal.

    Args:
        plan: Of the push.
        folder: Of the run.
        private: Whether new repositories are private.
        dry_run: Whether nothing will be sent.
    """
    lines, total = [], 0
    for target in plan.targets:
        size = sum(one.size for one in target.uploads)
        total += size
        kind = "data set" if target.kind == "dataset" else target.kind
        who = "private" if private else "public"
        lines.append(f"{target.repo_id} ({kind}, {who} if it is new), {size_in_words(size)}:")
        for one in target.uploads:
            masked = f"  (changed: {one.masked})" if one.masked else ""
            lines.append(f"  {size_in_words(one.size):>10}  {one.path}{masked}")
    lines += [f"Note: {note}" for note in plan.notes]
    if left := _left_behind(plan, folder):
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        lines.append(f"Stays here: {', '.join(left[:_SHOWN])}{more}.")
    count = sum(len(target.uploads) for target in plan.targets)
    lines.append(f"{count} files, {size_in_words(total)} in all.{' Nothing was sent: a dry run.' if dry_run else ''}")
    return lines


@contextmanager
def _plan(folder: Path, repo_id: str, merged: bool, base: str | None, scratch: Path) -> Iterator[Push]:
    """The model's repository, last, and that of its base before it."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected that of a run.")
    run, adapter = _read_run(folder), _is_adapter(folder)
    notes = _notes(folder, run)
    targets: list[Target] = []
    if merged and adapter:
        write_merged(folder, scratch, run)
        weights = collect(scratch, _WHOLE)
    elif merged:
        raise ValueError(f"{folder} holds a whole model, so there is nothing to merge; leave --merged out.")
    elif adapter:
        weights = _adapter_files(folder, find_base(folder, repo_id, run, base), targets)
    else:
        weights = collect(folder, _WHOLE)
    if base is not None and (merged or not adapter):
        raise ValueError("--base names the model under an adapter, and none is uploaded; leave it out.")
    card, said = _card(folder, merged)
    files = [card, *weights, *collect(folder, TOKENIZER), *collect(folder, _RECORDS)]
    targets.append(Target(repo_id, files, owned=(*WEIGHTS, "plots/*.png")))
    yield Push(targets, notes=notes + said)


def _adapter_files(folder: Path, base: Base, targets: list[Target]) -> list[Upload]:
    if base.target is not None:
        targets.append(base.target)
    config = adapter_config_for(folder, base)
    if isinstance(config.content, Path):
        return collect(folder, (_ADAPTER, ADAPTER_CONFIG))
    return [*collect(folder, (_ADAPTER,)), config]


def _is_adapter(folder: Path) -> bool:
    """Whether an adapter lies in a folder, and not a whole model.

    Raises:
        ValueError: Neither does, or both do.
    """
    adapter = (folder / _ADAPTER).is_file()
    whole = (folder / "model.safetensors").is_file() or (folder / INDEX).is_file()
    if adapter and whole:
        raise ValueError(
            f"{folder} holds both an adapter ({_ADAPTER}) and a whole model; delete what is of an earlier run."
        )
    if not adapter and not whole:
        inside = sorted(path.name for path in folder.glob("checkpoint-*"))
        hint = f" It has {inside[-1]}: finish the run with `hfkd train ... --resume`." if inside else ""
        raise ValueError(
            f"{folder} has no weights ({_ADAPTER} or model.safetensors); expected the folder of a finished run.{hint}"
        )
    return adapter


def _card(folder: Path, merged: bool) -> tuple[Upload, list[str]]:
    """The card that lies there, or one that is made now: of a merged model always, unless somebody wrote in it."""
    from hfkd.card import card_of_folder, is_untouched

    existing = collect(folder, (CARD,))
    if existing and not (merged and is_untouched((folder / CARD).read_text(encoding="utf-8"))):
        about = f"{CARD} isn't as hfkd wrote it and stays so; what it says of loading may be of the adapter."
        return existing[0], [about] if merged else []
    made, missing = card_of_folder(folder, merged=merged)
    said = [] if existing else [f"{CARD} isn't there and was made now; {one}." for one in missing]
    return Upload(CARD, masked_text(made).encode()), said


def _notes(folder: Path, run: Mapping[str, Any]) -> list[str]:
    notes = []
    if run and run.get("status") != "finished":
        notes.append(f"run.json says that the run is {run.get('status')}, not finished.")
    if not any((folder / name).is_file() for name in TOKENIZER):
        notes.append(f"there is no tokenizer in {folder}: who loads the model needs to find one elsewhere.")
    if code := sorted(path.name for path in folder.glob("*.py")):
        notes.append(f"{', '.join(code)}: code isn't uploaded, and the model may need it.")
    return notes


def _read_run(folder: Path) -> dict[str, Any]:
    """What `run.json` says; nothing where it isn't there.

    Raises:
        ValueError: It is damaged.
    """
    path = folder / "run.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged. Delete it to push without it, or bring it back.") from None


def _left_behind(plan: Push, folder: Path) -> list[str]:
    """What lies at the top of the run's folder and isn't uploaded."""
    taken = {one.path.split("/")[0] for one in _uploads(plan.targets)}
    if any(target.repo_id.endswith("-base") for target in plan.targets):
        taken.add("base")
    left = [path for path in sorted(folder.iterdir()) if path.name not in taken]
    return [f"{path.name}/" if path.is_dir() else path.name for path in left]


def _uploads(targets: Sequence[Target]) -> Iterator[Upload]:
    for target in targets:
        yield from target.uploads


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
