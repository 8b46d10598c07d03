"""What is in a file that may be uploaded: secrets and paths of this machine are masked in what hfkd wrote, and refused
in everything else, where a changed byte would change the model.

It says of what it finds only the kind: whatever it prints will be copied somewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from hfkd.masking import KNOWN_SECRETS, MASK, mask_secrets, shareable, shareable_text

PAGES = ("README.md", "run.json", "report.json", "report.html", "recipe.yaml")
"""Files that hfkd writes for people: in these something is masked, where others are refused."""
_SECRET, _PATH = "what looks like a token or a password", "a folder of this machine"
_VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json")
_ROWS = (".jsonl",)  # texts of a data set may speak of folders
# Where libraries note what a file was loaded from; nothing is loaded by it.
_NOTES = re.compile(r"^(_?name_or_path|tokenizer_file|special_tokens_map_file)$")
_NOT_NOTES = "base_model_name_or_path"
_ROOTS = "|".join(re.escape(one.name) for one in Path("/").iterdir() if one.is_dir())
_BELOW_ROOT = re.compile(rf"(?<![\w./~:-])/(?:{_ROOTS})/[^\s'\",;:=(){{}}\[\]<>`|\\]+")
_LARGEST_HEADER = 100_000_000


def gone_over(source: Path) -> tuple[Path | bytes, str]:
    """What of a file may be uploaded.

    Args:
        source: The file; its name decides how it is read.

    Returns:
        The file itself where nothing has to be changed, otherwise its changed content; and what was masked in it.

    Raises:
        ValueError: It holds a secret or a path that can't be masked, or isn't what its name says. The message names
            the file and the kind, not what was found.
    """
    if source.suffix == ".safetensors":
        return _refuse(source, [_safetensors_notes(source)])
    if source.suffix == ".parquet":
        return _parquet(source)
    content = source.read_bytes()
    if source.suffix == ".png":
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(f"{source} isn't a PNG picture, and isn't uploaded under that name. Delete it.")
        return _refuse(source, [content.decode("latin-1")])
    if source.suffix == ".model":
        return _refuse(source, [content.decode("latin-1")], paths=False)  # a vocabulary
    try:
        text = content.decode("utf-8")
        if source.name in PAGES:
            return _page(source, text)
        return _strict(source, text)
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError):
        kind = source.suffix.removeprefix(".")
        raise ValueError(f"{source} can't be read as {kind}: it is damaged. Delete it, or write it anew.") from None


def kind_of_secret(text: str, paths: bool = True) -> str:
    """What a text has in it that may not leave the machine, by its kind; nothing where there is nothing.

    Args:
        text: Any text.
        paths: Whether paths of this machine count.
    """
    if any(pattern.sub(MASK, text) != text for pattern in KNOWN_SECRETS):
        return _SECRET
    clean = mask_secrets(text)
    return _PATH if paths and masked_text(clean) != clean else ""


def masked_text(text: str) -> str:
    """A text without secrets and without paths of this machine, those of folders that are gone included.

    Args:
        text: For people to read.
    """
    return _BELOW_ROOT.sub(lambda path: PurePosixPath(path[0]).name, shareable_text(text))


def check_data(source: Path, data: Any) -> None:
    """Refuse what may not leave the machine in the data of a file that a model is loaded by.

    Args:
        source: Names the file in the message.
        data: As JSON has them.

    Raises:
        ValueError: Names the file and the kind.
    """
    _refuse(source, _texts(data))


def _page(source: Path, text: str) -> tuple[Path | bytes, str]:
    """A page for people, with what must not leave masked."""
    if source.suffix == ".json":
        masked = _masked_data(json.loads(text), lambda data: json.dumps(data, indent=2) + "\n")
    elif source.suffix == ".yaml":
        masked = _masked_data(
            yaml.safe_load(text), lambda data: yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        )
        masked = masked or (masked_text(text) if kind_of_secret(text) else None)  # in a comment
    else:
        masked = masked_text(text)
        masked = None if masked == text else masked
    if masked is None:
        return _refuse(source, [text])
    _refuse(source, [masked])
    return masked.encode(), kind_of_secret(text) or _SECRET


def _masked_data(data: Any, dump: Callable[[Any], str]) -> str | None:
    """Plain data with secrets and paths masked, written anew; None where there is nothing to mask."""
    masked = _each_text(shareable(data), lambda text: masked_text(text) if kind_of_secret(text) else text)
    return None if masked == data else dump(masked)


def _strict(source: Path, text: str) -> tuple[Path | bytes, str]:
    """A file that a model is loaded by: as it is, or not at all; only notes of where it came from may be changed."""
    if source.suffix in _ROWS or source.name in _VOCABULARIES:
        return _refuse(source, [text], paths=False)
    if source.suffix != ".json":
        return _refuse(source, [text])
    data = json.loads(text)
    _refuse(source, [text], paths=False)
    masked = _without_notes(data)
    _refuse(source, _texts(_without_vocabulary(masked) if source.name == "tokenizer.json" else masked))
    if masked == data:
        return source, ""
    return (json.dumps(masked, indent=2, ensure_ascii=False) + "\n").encode(), _PATH


def _without_notes(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    return {
        key: PurePosixPath(value).name
        if isinstance(value, str) and _NOTES.match(key) and key != _NOT_NOTES and kind_of_secret(value)
        else value
        for key, value in data.items()
    }


def _without_vocabulary(data: Any) -> Any:
    """A tokenizer without its tokens, which may look like anything."""
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        return data
    model = {key: value for key, value in data["model"].items() if key not in ("vocab", "merges")}
    return {**data, "model": model}


def _each_text(value: Any, change: Callable[[str], Any]) -> Any:
    """Plain data with each text, but not the keys, replaced."""
    if isinstance(value, dict):
        return {key: _each_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_each_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _texts(value: Any) -> Iterator[str]:
    """All texts in plain data, keys included."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _refuse(source: Path, texts: Any, paths: bool = True) -> tuple[Path, str]:
    for text in texts:
        if kind := kind_of_secret(text, paths):
            raise ValueError(
                f"{source.name} in {source.parent} holds {kind}, and nothing was uploaded. Take it out of the file "
                "(it isn't shown here), and push again."
            )
    return source, ""


def _safetensors_notes(source: Path) -> str:
    """The header of a file of weights, after a look at whether the file is as long as that says."""
    size, whole = source.stat().st_size, False
    with source.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 2 <= length <= min(size - 8, _LARGEST_HEADER) else b""
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        whole = size == 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    if not whole:
        raise ValueError(f"{source} is damaged or not whole: it isn't uploaded. Write the weights anew.")
    return json.dumps(entries.get("__metadata__") or {})


def _parquet(source: Path) -> tuple[Path, str]:
    with source.open("rb") as file:
        begin = file.read(4)
        file.seek(max(0, source.stat().st_size - 4))
        end = file.read(4)
    if begin != b"PAR1" or end != b"PAR1":
        raise ValueError(f"{source} is damaged or not whole: it isn't uploaded. Build the cache anew.")
    return source, ""
