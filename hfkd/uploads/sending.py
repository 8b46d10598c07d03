"""Sends files to repositories of the hub: first a look at all of them, then one commit each.

What is there already, byte by byte, isn't sent again, and nothing is committed where nothing changed; so a push that
was interrupted anywhere is repeated, not mended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils import logging

from hfkd.uploads.contents import masked_text
from hfkd.uploads.repositories import Hub, Say, Sent, Target
from hfkd.uploads.words import check_repo_id


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
        ValueError: A name can't be one; a repository is public and `private` is on; or one whose name the user didn't
            choose holds something else.
        HubError: Everything else that the hub or the network refuses.
    """
    with _looked_at(targets, private, token, say, how) as (hub, found):
        sent = []
        for target, there in zip(targets, found, strict=True):
            if there is None:
                hub.create(target)
            elif not private and there.private:
                say(f"{target.repo_id} is there already and is private; it stays so. Its settings can change that.")
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
            hub.create(target)
    return name


def _make_branch(hub: Hub, target: Target, revision: str | None) -> None:
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
) -> Iterator[tuple[Hub, list[Any | None]]]:
    """The hub, logged in to, and what it knows of each repository, none of which may be read by strangers unasked."""
    for target in targets:
        check_repo_id(target.repo_id)
    hub = Hub(token, say, private, how)
    with _quiet():
        hub.log_in()
        found = [hub.look(target) for target in targets]
        for target, there in zip(targets, found, strict=True):
            if there is not None:
                hub.check_private(target, there)
                hub.check_own(target, there)
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
