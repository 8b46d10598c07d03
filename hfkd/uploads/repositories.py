"""A repository of the hub: what it is to hold, and how it is brought to that; each call is made again where the error
passes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hfkd.uploads.files import Upload
from hfkd.uploads.words import (
    CONFLICTS,
    HubError,
    check_online,
    in_words,
    seconds_to_wait,
    status_of,
)

PAGE = "README.md"
_ATTEMPTS = 4
_EMPTY = (".gitattributes",)
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
        mark: A part of the page of a repository that hfkd made under a name that no user chose; one that is there
            without it is somebody's own, and refused. Empty where the user chose the name.
        option: How the user chooses another name.
        is_made: Tells a page that a program wrote; one that a person wrote on the hub isn't replaced by such a page.
            None replaces it.
    """

    repo_id: str
    uploads: Sequence[Upload] = ()
    kind: str = "model"
    owned: Sequence[str] = ()
    mark: str = ""
    option: str = ""
    is_made: Callable[[str], bool] | None = None

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


class _Refusal(ValueError):
    """What this module itself refuses, in words that need no others."""


@dataclass
class Hub:
    """The hub as one token sees it, and who shall be able to read what is sent there."""

    token: str | None
    say: Say
    private: bool
    how: str
    who: str = ""
    owners: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_online()
        self.given = self.token is not None
        self.token = self.token or get_token()
        if self.token is None:
            raise in_words(LocalTokenNotFoundError(), "", None)
        self.api = HfApi(token=self.token, library_name="hfkd")

    def ask(self, what: str, repo_id: str, call: Callable[[], Answer], shared: bool = False) -> Answer:
        """Call, and again after a while where the error is one that passes.

        Args:
            what: What is being done, for a line.
            repo_id: What with.
            call: Looks at all anew each time.
            shared: Whether somebody else may be doing the same.

        Raises:
            HubError: It didn't pass, or isn't one that does.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return call()
            except (_Refusal, HubError):
                raise
            except Exception as error:
                wait = seconds_to_wait(error, attempt, shared)
                if wait is None or attempt + 1 == _ATTEMPTS:
                    raise in_words(error, repo_id, self.token, self.who, self.given, shared) from None
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

    def check_private(self, target: Target, found: Any) -> None:
        """Hold who can read a repository against what is wanted.

        Raises:
            ValueError: All can, and that wasn't asked for.
        """
        if self.private and found.private is False:
            raise _Refusal(
                f"{target.repo_id} is there already and is public: everybody could read what is uploaded, so nothing "
                f"was. {self.how} if that is meant, make it private in its settings at {target.url}/settings, or "
                "choose another name."
            )

    def check_own(self, target: Target, found: Any) -> None:
        """Refuse to write over what isn't this user's own push, where the user didn't choose the name.

        Raises:
            ValueError: There are files, and no page that says that they are.
        """
        if not target.mark or not set(_names(found)) - set(_EMPTY):
            return
        page = self.ask(f"Looking at {target.repo_id}", target.repo_id, lambda: self.page(target, found))
        if target.mark.strip() not in page:
            raise _Refusal(
                f"{target.repo_id} is there already and holds something else, which would be lost, so nothing was "
                f"uploaded. Choose another name for it with {target.option}"
                f"{', name one that is on the hub with --base,' if target.kind == 'model' else ''} or delete it."
            )

    def page(self, target: Target, found: Any) -> str:
        """The page of a repository; empty where it has none."""
        if PAGE not in _names(found):
            return ""
        with tempfile.TemporaryDirectory() as scratch:
            path = self.api.hf_hub_download(
                target.repo_id, PAGE, repo_type=target.kind, revision=found.sha, local_dir=scratch
            )
            return Path(path).read_text(encoding="utf-8", errors="replace")

    def create(self, target: Target) -> None:
        """Make a repository; one that appeared since it was looked for is held to the same as one that was there."""

        def call() -> Any | None:
            try:
                self.api.create_repo(target.repo_id, repo_type=target.kind, private=self.private)
            except HfHubHTTPError as error:
                # Perhaps an answer that was lost on its way, and then it is made; perhaps somebody else's.
                found = self.look(target) if error.response.status_code in CONFLICTS else None
                if found is None:
                    raise
                return found
            return None

        found = self.ask(f"Making {target.repo_id}", target.repo_id, call)
        if found is not None:
            self.check_private(target, found)
            self.check_own(target, found)
        is_private = self.private if found is None else found.private
        self.say(f"Made {target.repo_id}, {'private' if is_private else 'public'}.")

    def commit(self, target: Target, message: str, revision: str | None) -> Sent:
        """Bring a repository to what it is to hold."""
        before: list[str] = []

        def call() -> Sent:
            # All anew at each attempt: a commit whose answer was lost is there, and mustn't be made twice; and who
            # can read it, or what the page says, may have changed since it was looked at.
            info = self.api.repo_info(target.repo_id, repo_type=target.kind, revision=revision)
            self.check_private(target, info)
            before.append(info.sha)
            kept = self.is_kept(target, info)
            uploads = [one for one in target.uploads if not (kept and one.path == PAGE)]
            add = [CommitOperationAdd(one.path, one.content) for one in uploads]
            delete = [CommitOperationDelete(name) for name in stale_files(target, _names(info))]
            done = self.api.create_commit(
                target.repo_id,
                [*add, *delete],
                commit_message=message,
                repo_type=target.kind,
                revision=revision,
                parent_commit=info.sha,
            )
            if kept:
                self.say(
                    f"{PAGE} of {target.repo_id} was written by a person, or changed by one, and stays as it is. "
                    "Delete it there, and push again, to have it made anew."
                )
            return Sent(target.url, done.oid, done.oid != before[0])

        sent = self.ask(f"Uploading to {target.repo_id}", target.repo_id, call, shared=True)
        found = self.look(target, revision)
        missing = {one.path for one in target.uploads} - set(_names(found))
        if missing:
            raise HubError(
                f"{target.repo_id} hasn't taken {', '.join(sorted(missing))}: its .gitignore leaves them out. Take "
                "the lines out of it, and run the same command again."
            )
        return sent

    def is_kept(self, target: Target, info: Any) -> bool:
        """Whether the page that is there is worth more than the one that is brought: a person's, and a program's."""
        brought = next((one for one in target.uploads if one.path == PAGE), None)
        if target.is_made is None or brought is None or not target.is_made(_text_of(brought)):
            return False
        page = self.page(target, info)
        return bool(page) and not target.is_made(page)


def stale_files(target: Target, names: Sequence[str]) -> list[str]:
    """Of the files that are in a repository those that an earlier push left and this one doesn't bring."""
    brought = {one.path for one in target.uploads}
    return [
        name
        for name in names
        if name not in brought
        and any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in target.owned)
    ]


def _text_of(upload: Upload) -> str:
    content = upload.content if isinstance(upload.content, bytes) else upload.content.read_bytes()
    return content.decode("utf-8", "replace")


def _names(info: Any | None) -> list[str]:
    return [one.rfilename for one in (info.siblings if info is not None else None) or []]
