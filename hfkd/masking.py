"""What must not leave a machine: secrets, names in home folders, and where things lay. Finds them in texts and data.

In data a text that is a whole path is known by its shape, on whatever machine it was one; in a sentence a path is
known by the folder that it begins with, or by being there. It reads no environment variable: what isn't known can't be
told by accident.
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
_MARKER_KEY = re.compile(
    r"^(pad|eos|bos|unk|sep|cls|mask|decoder_start|stop|additional_special|[be]o\w|s(?:oi|ot)|"
    r"(\w+_)?(image|video|audio|vision|think|box|fim|row|column|frame)(_\w+)?)_token$"
)
_MARKER = re.compile(r"[<\[{|(]\S{0,62}[>\]}|)]|\S{0,2}")  # a token of a vocabulary, as `<image>` or `[CLS]`
KNOWN_SECRETS = (
    re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}"),
    re.compile(r"\b(?:sk|rk)-[A-Za-z0-9_-]{16,}"),
    re.compile(
        r"\b(?:gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{12,}|AKIA[0-9A-Z]{12,}|xox[abp]-[\w-]{10,})"
    ),
    re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]*)?"),
    re.compile(r"\bAIza[\w-]{30,}"),
    re.compile(
        r"(?i)[?&](?:amp;)?(?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig)=[^&\s'\"<>)]+"
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
_OTHER_HOMES = re.compile(r"(?<![\w.])/(?:home|Users)/[^/\s'\"<>`,;:()\\]+|(?<![\w./])/root(?=/|$)")
_END = r"\s'\",;:=(){}\[\]<>`|"
_LONG_PATH = re.compile(rf"(?:\bfile://)?(?<![\w./~])/[^{_END}/]+(?:/[^{_END}/]+)+|\bfile://(?:/[^{_END}/]+)+")
_DRIVE = re.compile(rf"(?<!\w)[A-Za-z]:(?:[\\/]+[^{_END}\\/]+){{2,}}")
# Where files lie on usual systems, clusters and rented machines.
_ROOTS = frozenset(
    """
    Applications Users Volumes bin boot content data datasets dev efs etc fs fsx gpfs home kaggle lib lustre media mnt
    model models net network nfs opt private proj project projects root run sbin scratch shared srv storage sys tmp usr
    var work workdir workspace
    """.split()
)
# A text that is nothing but a path: /a/b, file:///a, ~/a, C:\a, \\host\a. Below the first folder there may be spaces.
_NO_NAME = r"\s/\\<>|\"{}"
_DEEPER = rf"(?:[\\/]+[^{_NO_NAME}]+(?: [^{_NO_NAME}]+)*)"
_WHOLE_PATH = re.compile(
    rf"(?:/[^{_NO_NAME}]+{_DEEPER}|file://{_DEEPER}|~[\w.-]*{_DEEPER}|[A-Za-z]:(?!//){_DEEPER}"
    rf"|\\\\[\w.-]+{_DEEPER}){_DEEPER}*[\\/]*"
)


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
    if not _SECRET_KEY.search(name) or _MARKER_KEY.match(name):
        return False
    texts = _texts_in(item)
    return any(texts) and not (name.endswith("_token") and all(map(_MARKER.fullmatch, texts)))


def _texts_in(item: Any) -> list[str]:
    if isinstance(item, Mapping):
        item = list(item.values())
    if isinstance(item, list | tuple | set):
        return [text for one in item for text in _texts_in(one)]
    return [item] if isinstance(item, str) else []


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
    """An assignment without its value, unless it has none or its name is that of a tokenizer's marker."""
    *_, name, between = found.groups()
    if _MARKER_KEY.match(name.rpartition(".")[2]):
        return found[0]
    value = found[0][found.end(found.re.groups) - found.start() :]
    if value.lstrip("\\\"'").startswith(MASK):  # masked before, and what follows isn't the value's
        return found[0]
    return found[0].removesuffix(value) + MASK


def shareable(value: Any) -> Any:
    """As `mask`, and each whole path by its last part: what a file may say that others will read."""
    return _without_folders(mask(value))


def shareable_text(text: str) -> str:
    """As `mask_text`, and each path in it by its last part, if it begins as paths do or is there on this machine."""
    text = _DRIVE.sub(lambda found: last_part(found[0]) if _below_root(found[0][2:]) else found[0], mask_text(text))
    return _LONG_PATH.sub(lambda found: last_part(found[0]) if _is_place(found[0]) else found[0], text)


def is_whole_path(text: str) -> bool:
    """Whether a text is a path that begins at the top of a disk, in a home folder or on another machine, and nothing
    else; by its shape, so it needn't be there. The ids of the hub and addresses of the web are none.
    """
    return _WHOLE_PATH.fullmatch(text) is not None


def last_part(path: str) -> str:
    """The name of what a path leads to, on any system."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return last_part(value) if isinstance(value, str) and is_whole_path(value) else value


def _is_place(path: str) -> bool:
    """Whether what looks like a path in a sentence is one."""
    if path.startswith("file:") or _below_root(path):
        return True
    try:
        return Path(path).parent.is_dir()
    except (OSError, ValueError):  # longer than a path can be
        return False


def _below_root(path: str) -> bool:
    return re.split(r"[\\/]+", path)[1] in _ROOTS


def safe_command(arguments: Sequence[str]) -> list[str]:
    """A command line that may be kept: the program by its name only, secrets masked, also after `--token`, and
    no folder of this machine."""
    if not arguments:
        return []
    kept, hide = [Path(arguments[0]).name], False
    for argument in arguments[1:]:
        kept.append(MASK if hide else _safe_argument(argument))
        hide = (
            argument.startswith("--") and "=" not in argument and bool(_SECRET_KEY.search(argument.replace("-", "_")))
        )
    return kept


def _safe_argument(argument: str) -> str:
    key, equals, value = mask_text(argument).rpartition("=")
    return key + equals + last_part(value) if is_whole_path(value) else shareable_text(argument)
