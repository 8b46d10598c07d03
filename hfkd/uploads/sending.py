"""Sends files to repositories of the hub: first a look at all of them, then one commit each.

What is there already, byte by byte, isn't sent again, and nothing is committed where nothing changed; so a push that
was interrupted anywhere is repeated, not mended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging

from hfkd.uploads.contents import masked_text
from hfkd.uploads.files import Upload
from hfkd.uploads.words import HubError, check_online, check_repo_id, in_words, seconds_to_wait, status_of

_ATTEMPTS = 4
Answer = TypeVar("Answer")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """What one repository is to hold.

    Attributes:
        repo_id: owner/name.
        uploads: Its files.
        kind: `model` or `dataset`.
        owned: Patterns of names that are deleted where they aren't among the files: weights of an earlier push would
            be loaded instead of, or with, the new ones.
    """

    repo_id: str
    uploads: Sequence[Upload] = ()
    kind: str = "model"
    owned: Sequence[str] = ()

    @property
    def url(self) -> str:
        """Where people find it."""
        return f"{HfApi().endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo_id}"


@dataclass(frozen=True)
class Sent:
    """What became of a repository.

    Attributes:
        url: Where it is.
        commit: The id of its last commit.
        changed: Whether a commit was made; if not, all was there.
    """

    url: str
    commit: str
    changed: bool


@dataclass
class _Hub:
    """The hub as one token sees it."""

    token: str | None
    say: Say
    who: str = ""
    owners: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_online()
        self.token = self.token or get_token()
        if self.token is None:
            raise in_words(LocalTokenNotFoundError(), "", None)
        self.api = HfApi(token=self.token, library_name="hfkd")

    def ask(self, what: str, repo_id: str, call: Callable[[], Answer]) -> Answer:
        """Call, and again after a while where the error is one that passes.

        Raises:
            HubError: It didn't pass, or isn't one that does.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return call()
            except Exception as error:
                wait = seconds_to_wait(error, attempt)
                if wait is None or attempt + 1 == _ATTEMPTS:
                    raise in_words(error, repo_id, self.token, self.who) from None
                reason = status_of(error) or "no connection"
                self.say(f"{what}: failed ({reason}); trying again in {wait:.0f} s.")
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def log_in(self) -> None:
        """Find out whose token it is, and that it may write."""
        known = self.ask("Logging in", "your account", self.api.whoami)
        groups = [str(one.get("name")) for one in known.get("orgs") or []]
        self.owners = [str(known.get("name")), *groups]
        self.who = self.owners[0] + (f" (of {', '.join(groups)})" if groups else "")
        role = ((known.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise HubError(
                f"The token of {self.who} may only read. Make one that may write at "
                "https://huggingface.co/settings/tokens, and log in with it (`hf auth login`)."
            )

    def look(self, target: Target, revision: str | None = None) -> Any | None:
        """What the hub knows of a repository; None where it has none that this token sees."""

        def call() -> Any | None:
            try:
                return self.api.repo_info(target.repo_id, repo_type=target.kind, revision=revision)
            except RevisionNotFoundError:
                return None
            except HfHubHTTPError as error:
                # Of a repository that isn't there the hub may say 401 too; the token was looked at before.
                if isinstance(error, RepositoryNotFoundError) or error.response.status_code == 404:
                    return None
                raise

        return self.ask(f"Looking at {target.repo_id}", target.repo_id, call)

    def check_private(self, target: Target, found: Any | None, private: bool, how: str) -> None:
        """Hold who can read a repository against what is wanted.

        Raises:
            ValueError: All can, and that wasn't asked for.
        """
        if found is None:
            return
        if private and found.private is False:
            raise ValueError(
                f"{target.repo_id} is there already and is public: everybody could read what is uploaded, so nothing "
                f"was. {how} if that is meant, make it private in its settings at {target.url}/settings, or choose "
                "another name."
            )
        if not private and found.private:
            self.say(f"{target.repo_id} is there already and is private; it stays so. Its settings can change that.")

    def create(self, target: Target, private: bool) -> None:
        """Make a repository."""

        def call() -> None:
            try:
                self.api.create_repo(target.repo_id, repo_type=target.kind, private=private)
            except HfHubHTTPError as error:
                # An answer that was lost on its way: it is made.
                if error.response.status_code != 409 or self.look(target) is None:
                    raise

        self.ask(f"Making {target.repo_id}", target.repo_id, call)
        self.say(f"Made {target.repo_id}, {'private' if private else 'public'}.")

    def commit(self, target: Target, message: str, revision: str | None) -> Sent:
        """Bring a repository to what it is to hold."""

        def call() -> Sent:
            # All anew at each attempt: a commit whose answer was lost is there, and mustn't be made twice.
            info = self.api.repo_info(target.repo_id, repo_type=target.kind, revision=revision)
            add = [CommitOperationAdd(one.path, one.content) for one in target.uploads]
            delete = [CommitOperationDelete(name) for name in stale_files(target, _names(info))]
            done = self.api.create_commit(
                target.repo_id, [*add, *delete], commit_message=message, repo_type=target.kind, revision=revision
            )
            return Sent(target.url, done.oid, done.oid != info.sha)

        sent = self.ask(f"Uploading to {target.repo_id}", target.repo_id, call)
        found = self.look(target, revision)
        missing = {one.path for one in target.uploads} - set(_names(found))
        if missing:
            raise HubError(
                f"{target.repo_id} hasn't taken {', '.join(sorted(missing))}: its .gitignore leaves them out. Take "
                "the lines out of it, and run the same command again."
            )
        return sent


def send(
    targets: Sequence[Target],
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    say: Say = lambda text: None,
    how: str = "Say --public",
) -> list[Sent]:
    """Bring repositories to what they are to hold; those that aren't there are made.

    Args:
        targets: In the order in which they are sent. All are looked at before the first one is changed.
        private: Whether new ones are private. One that is public is refused.
        token: None takes that of HF_TOKEN or of `hf auth login`.
        revision: A branch, which is made where it isn't there; None is the main one.
        message: Of the commits.
        say: Hears, line by line, what happens.
        how: How the caller lets public repositories be used, for a message.

    Raises:
        ValueError: A name can't be one, or a repository is public and `private` is on.
        HubError: Everything else that the hub or the network refuses.
    """
    with _looked_at(targets, private, token, say, how) as (hub, found):
        sent = []
        for target, there in zip(targets, found, strict=True):
            if there is None:
                hub.create(target, private)
            _make_branch(hub, target, revision)
            sent.append(hub.commit(target, masked_text(message or "Upload with hfkd"), revision))
    return sent


def check(
    targets: Sequence[Target], *, private: bool = True, token: str | None = None, how: str = "Say --public"
) -> None:
    """Do what `send` does before it changes anything: the names, the token, who can read what is there already.

    Args:
        targets: As in `send`.
        private: As in `send`.
        token: As in `send`.
        how: As in `send`.

    Raises:
        ValueError: As in `send`.
        HubError: As in `send`.
    """
    with _looked_at(targets, private, token, lambda text: None, how):
        pass


def create_missing(
    name: str, *, private: bool = True, token: str | None = None, say: Say = lambda text: None, how: str = "Say so"
) -> str:
    """Make a repository for models where it isn't there, as `send` does.

    Args:
        name: owner/name, or a name below the user's own.
        private: As in `send`.
        token: As in `send`.
        say: As in `send`.
        how: As in `send`.

    Returns:
        owner/name.
    """
    check_repo_id(name if "/" in name else f"owner/{name}")
    if "/" not in name:
        with _looked_at([], private, token, say, how) as (hub, _):
            name = f"{hub.owners[0]}/{name}"
    target = Target(name)
    with _looked_at([target], private, token, say, how) as (hub, found):
        if found[0] is None:
            hub.create(target, private)
    return name


def stale_files(target: Target, names: Sequence[str]) -> list[str]:
    """Of the files that are in a repository those that an earlier push left and this one doesn't bring."""
    brought = {one.path for one in target.uploads}
    return [
        name
        for name in names
        if name not in brought
        and any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in target.owned)
    ]


def _names(info: Any | None) -> list[str]:
    return [one.rfilename for one in (info.siblings if info is not None else None) or []]


def _make_branch(hub: _Hub, target: Target, revision: str | None) -> None:
    if revision is None or hub.look(target, revision) is not None:
        return
    hub.ask(
        f"Making the branch {revision}",
        target.repo_id,
        lambda: hub.api.create_branch(target.repo_id, branch=revision, repo_type=target.kind, exist_ok=True),
    )


@contextmanager
def _looked_at(
    targets: Sequence[Target], private: bool, token: str | None, say: Say, how: str
) -> Iterator[tuple[_Hub, list[Any | None]]]:
    """The hub, logged in to, and what it knows of each repository, none of which may be read by strangers unasked."""
    for target in targets:
        check_repo_id(target.repo_id)
    hub = _Hub(token, say)
    with _quiet():
        hub.log_in()
        found = [hub.look(target) for target in targets]
        for target, there in zip(targets, found, strict=True):
            hub.check_private(target, there, private, how)
        yield hub, found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's own lines off the terminal: they hold signed addresses."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
