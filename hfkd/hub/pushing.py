"""`push`: a run's folder as a repository of the hub. What goes there is planned, gone over and shown before anything
is sent; how it is sent is `hfkd.uploads`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from hfkd.cache.folder import size_in_words
from hfkd.card import build_card, is_untouched, read_run
from hfkd.card.marker import marked
from hfkd.hub.caches import cache_target
from hfkd.hub.merging import write_merged
from hfkd.uploads import (
    ADAPTER_CONFIG,
    BASE,
    INDEX,
    RUN,
    TOKENIZER,
    WEIGHTS,
    Base,
    Sent,
    Target,
    Upload,
    adapter_config_for,
    base_target,
    check,
    check_repo_id,
    collect,
    find_base,
    masked_text,
    owned_by,
    send,
)

CARD = "README.md"
_ADAPTER = "adapter_model.safetensors"
_WHOLE = tuple(name for name in WEIGHTS if not name.startswith("adapter_"))
_RECORDS = tuple(name for name in RUN if name != CARD)
# The pictures that a run leaves under one name, whatever was measured; others in that folder may be a person's.
_PICTURES = tuple(f"plots/{name}.png" for name in ("loss", "accuracy", "reliability", "agreement"))
_MARK = "\n<!-- hfkd card sha256:"
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
    base_repo: str | None = None,
    cache: str | Path | None = None,
    cache_repo: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    console: Console | None = None,
) -> Push:
    """Send a run's weights, tokenizer, card, records and pictures to the hub, in one commit; its cache too, if asked;
    and a base that was cut out of a larger model, into a repository with `-base` behind the name. A card that a person
    wrote on the hub isn't replaced by one that was made here.

    Args:
        folder: Of a run; it isn't changed.
        repo_id: owner/name; made where it isn't there.
        private: Whether repositories that are made are private; one that is public already is refused.
        merged: Send the adapter and its base as one whole model.
        base: The id on the hub of the model under the adapter, where `adapter_config.json` names a folder.
        base_repo: The owner/name for a base that was cut out; None adds `-base` to `repo_id`.
        cache: The folder of a teacher's cache, to send as a data set.
        cache_repo: The data set's owner/name; None adds `-cache` to `repo_id`.
        dry_run: Say what would be sent, and ask the network nothing.
        token: None takes that of HF_TOKEN or of `hf auth login`.
        revision: A branch, which is made where it isn't there; None is the main one.
        message: Of the commit.
        console: Where it prints; None prints to the terminal.

    Raises:
        ValueError: A name can't be one, there are no weights, a file holds what may not be uploaded, the repository is
            public and `private` is on, or one whose name was made up here (`-base`, `-cache`) holds something else.
        OSError: A file can't be read; or, as a `HubError`, the hub or the network refuses.
    """
    folder, console = Path(folder), console or Console()
    for name in filter(None, (repo_id, cache_repo, base, base_repo)):
        check_repo_id(name)
    if merged and not dry_run:
        check([Target(repo_id)], private=private, token=token)  # merging takes a while
    with tempfile.TemporaryDirectory() as scratch:
        plan = _plan(folder, repo_id, merged, Path(scratch), base, base_repo, revision)
        if cache is not None:
            plan.targets.append(cache_target(cache, cache_repo or f"{repo_id}-cache", chosen=cache_repo is not None))
        for line in plan_lines(plan, folder, private, dry_run):
            _say(console, line)
        if not dry_run:
            options = {"private": private, "token": token, "revision": revision, "message": message}
            plan.sent = send(plan.targets, **options, say=lambda line: _say(console, line))
            for sent in plan.sent:
                _say(console, f"{sent.url}: {'uploaded' if sent.changed else 'all of it was there already'}.")
    return plan


def check_push(repo_id: str, *, private: bool = True, token: str | None = None, with_base: bool = False) -> None:
    """Find out before hours of training whether a push at their end could work: the name, the token, who can read it.

    Args:
        repo_id: As in `push`.
        with_base: Whether a base that is cut out will go along.
        private: As in `push`.
        token: As in `push`.

    Raises:
        ValueError: As in `push`.
        OSError: As in `push`.
    """
    targets = [base_target(repo_id), Target(repo_id)] if with_base else [Target(repo_id)]
    check(targets, private=private, token=token)


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
    return list(_plan(Path(folder), repo_id, merged, scratch or Path(), base).targets[-1].uploads)


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


def _plan(
    folder: Path,
    repo_id: str,
    merged: bool,
    scratch: Path,
    base: str | None = None,
    base_repo: str | None = None,
    revision: str | None = None,
) -> Push:
    """The model's repository, last, and that of its base before it; merged weights stay in `scratch`."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected that of a run.")
    run, adapter = _read_run(folder), _is_adapter(folder)
    if merged or not adapter:
        _refuse_names(base, base_repo)
    notes = _notes(folder, run)
    targets: list[Target] = []
    if merged and adapter:
        write_merged(folder, scratch, run)
        weights = collect(scratch, _WHOLE)
    elif merged:
        raise ValueError(f"{folder} holds a whole model, so there is nothing to merge; leave --merged out.")
    elif adapter:
        below = find_base(folder, repo_id, run, base, base_repo, finish=_marked)
        targets += [replace(below.target, is_made=is_untouched)] if below.target else []
        weights = _adapter_files(folder, below, revision)
    else:
        weights = collect(folder, _WHOLE)
    if not any(one.path.endswith(".safetensors") for one in weights):
        raise ValueError(f"{folder}: {INDEX} names no weights, so nothing was uploaded. Write the weights anew.")
    if base_repo is not None:
        notes.append(f"the card speaks of {repo_id}-base, and adapter_config.json rightly of {base_repo}.")
    card, said = _card(folder, merged, base)
    files = [card, *weights, *collect(folder, TOKENIZER), *collect(folder, _RECORDS)]
    targets.append(Target(repo_id, files, owned=(*owned_by(files), *_PICTURES), is_made=is_untouched))
    return Push(targets, notes=notes + said)


def _refuse_names(base: str | None, base_repo: str | None) -> None:
    for option, name in (("--base", base), ("--base-repo", base_repo)):
        if name is not None:
            raise ValueError(f"{option} names the model under an adapter, and none is uploaded; leave it out.")


def _adapter_files(folder: Path, base: Base, revision: str | None) -> list[Upload]:
    config = adapter_config_for(folder, base, revision)
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


def _card(folder: Path, merged: bool, base: str | None) -> tuple[Upload, list[str]]:
    """The card that lies there, or one that is made now: of a merged model, and where the base was told just now,
    always, unless somebody wrote in it.
    """
    existing = collect(folder, (CARD,))
    untouched = bool(existing) and is_untouched((folder / CARD).read_text(encoding="utf-8"))
    anew = merged or base is not None
    if existing and not (anew and untouched):
        card, of = existing[0], "the adapter" if merged else "a folder"
        if untouched and isinstance(card.content, bytes):  # masked
            card = replace(card, content=_marked(card.content.decode("utf-8")).encode())
        about = f"{CARD} isn't as hfkd wrote it and stays so; what it says of loading may be of {of}."
        return card, [about] if anew else []
    found = read_run(folder)
    run = found.run if base is None else _on_base(found.run, base)
    made = build_card(run, found.report, files=found.files, missing=found.missing, merged=merged)
    said = [] if existing else [f"{CARD} isn't there and was made now; {one}." for one in found.missing]
    return Upload(CARD, _marked(masked_text(made)).encode()), said


def _on_base(run: Mapping[str, Any], base: str) -> dict[str, Any]:
    """What a run says of itself, with the hub's id for the model that it knew as a folder."""
    origins = run.get("origins") or {}
    student = {**(origins.get("student") or {}), "id": base, "source": "hub", "revision": None}
    return {**run, "origins": {**origins, "student": student}}


def _marked(page: str) -> str:
    """A page with the digest that its last line has, or gets: masking may have changed it."""
    return marked(page.partition(_MARK)[0].rstrip("\n"))


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
    if sum(target.kind == "model" for target in plan.targets) > 1:
        taken.add(BASE)
    left = [path for path in sorted(folder.iterdir()) if path.name not in taken]
    return [f"{path.name}/" if path.is_dir() else path.name for path in left]


def _uploads(targets: Sequence[Target]) -> Iterator[Upload]:
    for target in targets:
        yield from target.uploads


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
