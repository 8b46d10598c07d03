"""What must not leave a machine: secrets, names in home folders, and where things lay. Finds them in texts and data.

It reads no environment variable: what isn't known can't be told by accident.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MASK = "***"
_SECRET_KEY = re.compile(
    r"(^|_)(token|secret|passw(or)?d|(api|access|private|secret)_?key|credentials?|authorization)$", re.IGNORECASE
)
_MARKER_KEY = re.compile(r"^(pad|eos|bos|unk|sep|cls|mask|decoder_start|image|stop|additional_special)_token$")
KNOWN_SECRETS = (
    re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}"),
    re.compile(r"\b(?:sk|rk)-[A-Za-z0-9_-]{16,}"),
    re.compile(
        r"\b(?:gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{12,}|AKIA[0-9A-Z]{12,}|xox[abp]-[\w-]{10,})"
    ),
    re.compile(r"(?i)(?<=bearer )[\w.~+/=-]{8,}"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    re.compile(r"(?<=://)(?!git@)[^/\s:@?#'\"]+(?=@)"),
)
_NAME = r"((?:[\w.-]*[_.-])?(?:token|secret|passw(?:or)?d|(?:api|access|private|secret)[_-]?key))"
_QUOTED = r"""\\*"[^"\n]*"|'[^'\n]*'|\[[^]\n]*["'][^]\n]*\]"""
_PLAIN = r"""[^\s,;'"}\]]+"""
_NOTHING = r"(?!(?:null|none|true|false|~|[\d.]+)\s*(?:[,}\]]|$))"
# Each with the name, what stands between, and the value.
_ASSIGNMENTS = (
    re.compile(rf"(?i)\b{_NAME}(\s*=\s*)(?:{_QUOTED}|{_PLAIN})"),
    re.compile(rf"""(?i)(?<=["']){_NAME}(\\*["']\s*:\s*)(?:{_QUOTED})"""),
    re.compile(rf"(?i)(?<!\S)--{_NAME}(\s+)(?!-)\S+"),
    re.compile(r"""(?i)\b(authorization)(["']?\s*[:=]\s*["']?(?:(?:basic|bearer|digest|token)\s+)?)[^\s,;'"}\]]+"""),
)
_IN_BRACES = re.compile(rf"(?i)(?<=[{{,])(?P<space>\s*){_NAME}(\s*:\s*){_NOTHING}(?:{_QUOTED}|{_PLAIN})")
_OTHER_HOMES = re.compile(r"(?<![\w.])/(?:home|Users)/[^/\s'\"]+|(?<![\w./])/root(?=/|$)")
_LONG_PATH = re.compile(r"(?<![\w./~])/[^\s'\",;=(){}\[\]/]+(?:/[^\s'\",;=(){}\[\]/]+)+")


def mask(value: Any) -> Any:
    """A copy of plain data with secrets masked, home folders as `~` and the working folder left out of paths."""
    if isinstance(value, Mapping):
        return {mask_text(str(key)): MASK if is_secret(key, item) else mask(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [mask(item) for item in value]
    if isinstance(value, os.PathLike):
        return mask_text(os.fspath(value))
    return mask_text(value) if isinstance(value, str) else value


def is_secret(key: Any, item: Any) -> bool:
    """Whether a key says that what stands under it, a text or a collection with texts, is a secret."""
    name = str(key)
    return bool(_SECRET_KEY.search(name)) and not _MARKER_KEY.match(name) and _holds_text(item)


def _holds_text(item: Any) -> bool:
    if isinstance(item, Mapping):
        return any(map(_holds_text, item.values()))
    if isinstance(item, list | tuple | set):
        return any(map(_holds_text, item))
    return isinstance(item, str) and bool(item)


def mask_text(text: str) -> str:
    """A text without what looks like a token or an assigned secret, and without the paths that name a person."""
    text = mask_secrets(text)
    here, home = str(Path.cwd()), str(Path.home())
    if len(here) > 1:
        text = re.sub(
            re.escape(here) + r"(?:/|(?=$|[\s'\",]))", lambda found: "" if found[0].endswith("/") else ".", text
        )
    if len(home) > 1:
        text = re.sub(re.escape(home) + r"(?=$|[/\s'\",])", "~", text)
    return _OTHER_HOMES.sub("~", text)


def mask_secrets(text: str) -> str:
    """A text without what looks like a token or an assigned secret; paths stay."""
    for pattern in KNOWN_SECRETS:
        text = pattern.sub(MASK, text)
    for pattern in _ASSIGNMENTS:
        text = pattern.sub(_without_value, text)
    before, brace, rest = text.partition("{")  # outside of braces `token: x` is a sentence
    return before + _IN_BRACES.sub(_without_value, brace + rest)


def _without_value(found: re.Match[str]) -> str:
    """An assignment without its value, unless its name is that of a tokenizer's marker."""
    *_, name, between = found.groups()
    if _MARKER_KEY.match(name.rpartition(".")[2]):
        return found[0]
    value = found[0][found.end(found.re.groups) - found.start() :]
    return found[0].removesuffix(value) + MASK


def shareable(value: Any) -> Any:
    """As `mask`, and each whole path of this machine by its last part: what a file may say that others will read."""
    return _without_folders(mask(value))


def shareable_text(text: str) -> str:
    """As `mask_text`, and each whole path of this machine in it by its last part."""
    return _LONG_PATH.sub(lambda found: _last_part(found[0]), mask_text(text))


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return _last_part(value) if isinstance(value, str) and _LONG_PATH.fullmatch(value) else value


def _last_part(path: str) -> str:
    """Of a path that is one on this machine; a text that only looks like one stays."""
    folder = Path(path)
    return folder.name if folder.parent.is_dir() else path


def safe_command(arguments: Sequence[str]) -> list[str]:
    """A command line that may be kept: the program by its name only, secrets masked, also after `--token`, and
    no folder of this machine."""
    if not arguments:
        return []
    kept, hide = [Path(arguments[0]).name], False
    for argument in arguments[1:]:
        kept.append(MASK if hide else shareable_text(argument))
        hide = (
            argument.startswith("--") and "=" not in argument and bool(_SECRET_KEY.search(argument.replace("-", "_")))
        )
    return kept
