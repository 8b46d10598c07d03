"""What went wrong with the hub, in words: what was got, what to do, and never the token.

Also which errors pass by themselves, and after how long.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from hfkd.masking import MASK, mask_secrets

LONGEST_WAIT = 300.0
"""Seconds: whoever is asked to wait longer is told so, and not kept waiting."""
_PASSES = (408, 425, 429, 500, 502, 503, 504)
CONFLICTS = (409, 412)
"""What the hub answers where somebody else was faster."""
_LONGEST_QUOTE = 300
_AGAIN = (
    "What a repository gets comes in one commit, so nothing half is there. Run the same command again: what arrived "
    "isn't sent twice."
)
_SETTINGS = "https://huggingface.co/settings/tokens"
_LOGIN = f"Make one that may write at {_SETTINGS} and log in with `hf auth login`, or set HF_TOKEN."


class HubError(OSError):
    """The hub refused something, or couldn't be reached; the message says what to do and has no token in it."""


def check_repo_id(repo_id: str) -> None:
    """Refuse a name that no repository can have, before anything goes over the network.

    Args:
        repo_id: owner/name.

    Raises:
        ValueError: What is wrong with it.
    """
    try:
        validate_repo_id(repo_id)
        wrong = "" if repo_id.count("/") == 1 else "it has no owner"
    except HFValidationError as error:
        wrong = str(error).split(":")[0].rstrip(".")
    if wrong:
        raise ValueError(
            f"The repository's name is {repo_id!r}: {wrong}. Expected owner/name, where owner is your name on the hub "
            "or an organization of yours: letters, digits, '-', '_' and '.', at most 96 in all."
        )


def check_online() -> None:
    """Refuse to begin where the libraries are told to stay offline.

    Raises:
        HubError: They are.
    """
    if constants.is_offline_mode():
        raise HubError(
            "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so nothing may be uploaded. Unset it and run the same "
            "command again."
        )


def status_of(error: BaseException) -> int | None:
    """The status of the hub's answer that an error is about; None where there was no answer."""
    for one in _chain(error):
        if isinstance(one, HfHubHTTPError) or _of_client(one, "HTTPStatusError"):
            return one.response.status_code
    return None


def seconds_to_wait(error: BaseException, attempt: int, shared: bool = False) -> float | None:
    """How long to wait before trying once more.

    Args:
        error: What went wrong.
        attempt: How often it was tried before, from 0.
        shared: Whether somebody else may do the same at the same time, and doing it anew can help then.

    Returns:
        Seconds; None where trying again can't help.
    """
    if any(isinstance(one, OfflineModeIsEnabled) for one in _chain(error)):
        return None
    status, backoff = status_of(error), 2.0 * 2**attempt
    if status is not None:
        asked = _asked_for(error)
        wait = backoff if asked is None else asked
        passes = status in _PASSES or (shared and status in CONFLICTS)
        return wait if passes and wait <= LONGEST_WAIT else None
    return backoff if any(map(_is_lost, _chain(error))) else None


def in_words(
    error: BaseException, repo_id: str, token: str | None, who: str = "", given: bool = False, shared: bool = False
) -> Exception:
    """An error of the hub's client as one that a user can act on.

    Args:
        error: What the client raised.
        repo_id: What it was about.
        token: Mustn't be in the message, whatever its form.
        who: Whose token it is, in words.
        given: Whether the caller gave the token, instead of the environment or a login.
        shared: As for `seconds_to_wait`.
    """
    status, said = status_of(error), _said(error, token)
    quoted = f" The hub says: {said}" if said else ""
    if isinstance(error, LocalTokenNotFoundError):
        return HubError(f"There is no token to upload with. {_LOGIN}")
    if status is not None:
        if shared and status in CONFLICTS:
            return HubError(
                f"{repo_id} was changed by somebody else each time that this was to be uploaded ({status}). Try again "
                f"in a minute.{quoted}"
            )
        if status == 401:
            return HubError(f"{_refused_token(given)}{quoted}")
        return HubError(_of_status(status, repo_id, who) + quoted)
    if seconds_to_wait(error, 0) is not None:
        return HubError(f"The connection to {constants.ENDPOINT} broke, again and again ({_name(error)}). {_AGAIN}")
    if "LFS batch API" in said:
        return HubError(
            f"{repo_id} can't take one of the files, because of its size or of the space that is left.{quoted}"
        )
    return type(error)(said) if type(error) in (ValueError, OSError) else HubError(f"{_name(error)}: {said}")


def _refused_token(given: bool) -> str:
    where = " The one in HF_TOKEN was taken, which goes before a login." if os.environ.get("HF_TOKEN") else ""
    where = " It is the one that was given with the call, not one of HF_TOKEN or a login." if given else where
    return f"The hub refused the token (401): it is wrong, has expired or was revoked.{where} {_LOGIN}"


def _of_status(status: int, repo_id: str, who: str) -> str:
    host = constants.ENDPOINT
    if status == 403:
        whose = f" It is that of {who}." if who else ""
        return (
            f"The token may not do this with {repo_id} (403).{whose} Choose an owner "
            f"that you may write for, or give the token the right to write at {_SETTINGS}."
        )
    if status == 402:
        return f"The hub wants a paid plan for this (402): {repo_id} would be larger than the free one allows, say."
    if status == 404:
        return (
            f"{repo_id} isn't there (404): it was deleted or renamed meanwhile, or the token may not see it. Run the "
            "same command again to have it made anew, or choose another name."
        )
    if status in CONFLICTS:
        return (
            f"{repo_id} is taken ({status}): there is a repository of that name which this token can't use. Choose "
            "another name."
        )
    if status == 413:
        return (
            f"A file is too large for {host} (413). Save the weights in smaller parts (`save_pretrained` with "
            "max_shard_size), or push the adapter without --merged."
        )
    if status == 429:
        return f"{host} gets too many requests from this account (429). Wait some minutes. {_AGAIN}"
    if status >= 500:
        return f"{host} has trouble of its own ({status}), again and again. {_AGAIN}"
    return f"The hub refused this ({status})."


def _said(error: BaseException, token: str | None) -> str:
    """What the hub answered, or else what the error says: short, in one line, without secrets."""
    text = next((one.server_message or "" for one in _chain(error) if isinstance(one, HfHubHTTPError)), str(error))
    if token:
        text = text.replace(token, MASK)
    text = " ".join(mask_secrets(text).split())
    text = "".join(one for one in text if one.isprintable())
    return text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 1] + "…"


def _asked_for(error: BaseException) -> float | None:
    """The seconds that the hub asks to wait for: `Retry-After`, or `ratelimit` where that is used up."""
    for one in _chain(error):
        if not isinstance(one, HfHubHTTPError):
            continue
        headers = one.response.headers
        if spent := re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("ratelimit", "")):
            return float(spent[1]) + 1
        wanted = headers.get("retry-after", "").strip()
        if wanted.isdigit():
            return float(wanted)
        try:
            date = parsedate_to_datetime(wanted)
        except (TypeError, ValueError):
            continue
        return max(0.0, (date - datetime.datetime.now(date.tzinfo)).total_seconds())
    return None


def _is_lost(error: BaseException) -> bool:
    """Whether an error is of a connection that broke."""
    if isinstance(error, ConnectionError | TimeoutError | json.JSONDecodeError):
        return True
    return _of_client(error, "TransportError") or _of_xet(error)


def _of_client(error: BaseException, name: str) -> bool:
    """Whether it is an error of the library below huggingface_hub, `httpx` or `httpx2` by its version."""
    return any(one.__name__ == name and one.__module__.startswith("httpx") for one in type(error).__mro__)


def _of_xet(error: BaseException) -> bool:
    """Whether it comes from the storage's own client, whose errors have no status."""
    return type(error) is RuntimeError and "xet" in str(error).lower()


def _name(error: BaseException) -> str:
    return type(list(_chain(error))[-1]).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
