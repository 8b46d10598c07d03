"""What is in a file that may be uploaded: secrets and paths of this machine are masked in what hfkd wrote, and refused
in everything else, where a changed byte would change the model.

It says of what it finds only the kind: whatever it prints will be copied somewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from hfkd.masking import (
    KNOWN_SECRETS,
    MASK,
    is_secret,
    is_whole_path,
    last_part,
    mask_secrets,
    shareable,
    shareable_text,
)

PAGES = ("README.md", "run.json", "report.json", "report.html", "recipe.yaml")
"""Files that hfkd writes for people: in these something is masked, where others are refused."""
_SECRET, _PATH = "what looks like a token or a password", "a folder of this machine"
_VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json")
_ROWS = (".jsonl",)  # texts of a data set may speak of folders
# Where libraries note what a file was loaded from; nothing is loaded by it.
_NOTES = re.compile(r"^(_?name_or_path|tokenizer_file|special_tokens_map_file)$")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Parts of a tokenizer's files whose texts may look like anything, and which are told by their known forms only.
_TEMPLATES, _TOKENS = ("chat_template",), ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens")
_MARKUP = re.compile(r"(<[^<>]*>)")
_PICTURE = re.compile(r"data:image/[\w.+-]+;base64,[A-Za-z0-9+/=]+")
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
        return check_data(source, _safetensors_notes(source))
    if source.suffix == ".parquet":
        return _parquet(source)
    content = source.read_bytes()
    if source.suffix == ".png":
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(f"{source} isn't a PNG picture, and isn't uploaded under that name. Delete it.")
        return _refuse(source, [_notes_of_picture(content)])
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
    """A text without secrets and without paths of this machine, those of folders that are gone included; pictures
    that are part of it stay as they are.

    Args:
        text: For people to read.
    """
    pictures = _PICTURE.findall(text)
    parts = [shareable_text(part) for part in _PICTURE.split(text)]
    return "".join(part + picture for part, picture in zip(parts, [*pictures, ""], strict=True))


def check_data(source: Path, data: Any) -> tuple[Path, str]:
    """Refuse what may not leave the machine in the data of a file that a model, or a cache, is loaded by: what looks
    like a secret, what a key says is one, and whole paths.

    Args:
        source: Names the file in the message.
        data: As JSON has them.

    Raises:
        ValueError: Names the file and the kind.
    """
    if _has_secret_key(data):
        raise _refused(source, _SECRET)
    for text in _texts(data):
        kind = kind_of_secret(text) or (_SECRET if mask_secrets(text) != text else "")
        if kind or is_whole_path(text):
            raise _refused(source, kind or _PATH)
    return source, ""


def _page(source: Path, text: str) -> tuple[Path | bytes, str]:
    """A page for people, with what must not leave masked."""
    data = None
    if source.suffix == ".json":
        data = json.loads(text)
        masked = _masked_data(data, lambda data: json.dumps(data, indent=2) + "\n")
    elif source.suffix == ".yaml":
        data = yaml.safe_load(text)
        masked = _masked_data(data, lambda data: yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
        masked = masked or (masked_text(text) if kind_of_secret(text) else None)  # in a comment
    else:
        # A value ends where a mark of the page begins.
        parts = _MARKUP.split(text) if source.suffix == ".html" else [text]
        masked = "".join(map(masked_text, parts))
        masked = None if masked == text else masked
    if masked is None:
        return _refuse(source, [_PICTURE.sub("", text)])
    _refuse(source, [_PICTURE.sub("", masked)])
    words = _PICTURE.sub("", text)
    has_secret = _has_secret_key(data) or mask_secrets(words) != words
    return masked.encode(), _SECRET if has_secret else _PATH


def _masked_data(data: Any, dump: Callable[[Any], str]) -> str | None:
    """Plain data with secrets and paths masked, written anew; None where there is nothing to mask."""
    masked = _each_text(shareable(data), lambda text: masked_text(text) if kind_of_secret(text) else text)
    return None if masked == data else dump(masked)


def _strict(source: Path, text: str) -> tuple[Path | bytes, str]:
    """A file that a model is loaded by: as it is, or not at all; only notes of where it came from may be changed."""
    if source.suffix in _ROWS or source.name in _VOCABULARIES:
        return _refuse(source, [text], paths=False)
    if source.suffix == ".jinja":
        return _check_template(source, text)
    if source.suffix != ".json":
        return _refuse(source, [text])
    data = json.loads(text)
    _refuse(source, [text], paths=False)
    masked = _without_notes(data)
    if source.name == "tokenizer.json":
        _check_tokenizer(source, masked)
    else:
        for template in _texts([data.get(key) for key in _TEMPLATES] if isinstance(data, dict) else []):
            _check_template(source, template)
        check_data(source, _without(masked, (*_TEMPLATES, *_TOKENS)))
    if masked == data:
        return source, ""
    return (json.dumps(masked, indent=2, ensure_ascii=False) + "\n").encode(), _PATH


def _check_tokenizer(source: Path, data: Any) -> None:
    """A tokenizer's patterns and tokens may look like paths and assignments; its vocabulary like anything."""
    data = {**data, "model": _without(data.get("model"), ("vocab", "merges"))} if isinstance(data, dict) else data
    if _has_secret_key(data):
        raise _refused(source, _SECRET)
    _refuse(source, _texts(data))


def _check_template(source: Path, text: str) -> tuple[Path, str]:
    """A template may speak of tokens, and show paths to a model, but not those of whoever pushes it."""
    if any(len(own) > 1 and f"{own}/" in text for own in (str(Path.home()), str(Path.cwd()))):
        raise _refused(source, _PATH)
    return _refuse(source, [text], paths=False)


def _without_notes(data: Any) -> Any:
    """Notes of where a file was loaded from by their last part, unless that is an id of the hub."""
    if not isinstance(data, dict):
        return data
    return {
        key: last_part(value)
        if isinstance(value, str) and _NOTES.match(key) and not _HUB_ID.fullmatch(value)
        else _without_notes(value)
        for key, value in data.items()
    }


def _without(data: Any, keys: tuple[str, ...]) -> Any:
    return {key: value for key, value in data.items() if key not in keys} if isinstance(data, dict) else data


def _has_secret_key(data: Any) -> bool:
    if isinstance(data, Mapping):
        return any(is_secret(key, value) or _has_secret_key(value) for key, value in data.items())
    return isinstance(data, list) and any(map(_has_secret_key, data))


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
            raise _refused(source, kind)
    return source, ""


def _refused(source: Path, kind: str) -> ValueError:
    return ValueError(
        f"{source.name} in {source.parent} holds {kind}, and nothing was uploaded. Take it out of the file (it isn't "
        "shown here), and push again."
    )


def _notes_of_picture(content: bytes) -> str:
    """All of a PNG picture but its points, in which any bytes may stand by chance."""
    notes, at = [], 8
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] != b"IDAT":
            notes.append(content[at:end])
        at = end
    return b"\n".join([*notes, content[at:]]).decode("latin-1")


def _safetensors_notes(source: Path) -> dict[str, Any]:
    """The notes and the names in a file of weights, after a look at whether the file is as long as its header says."""
    size, whole = source.stat().st_size, False
    with source.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 2 <= length <= min(size - 8, _LARGEST_HEADER) else b""
    try:
        entries = json.loads(header)
        notes = entries.pop("__metadata__", None) or {}
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        whole = size == 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    if not whole:
        raise ValueError(f"{source} is damaged or not whole: it isn't uploaded. Write the weights anew.")
    return {"notes": notes, "names": "\n".join(entries)}


def _parquet(source: Path) -> tuple[Path, str]:
    """A file of rows, with a look at the notes and the names that go with them."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(source) as file:
            schema, notes = file.schema_arrow, file.metadata.metadata
    except (pyarrow.ArrowException, OSError):
        raise ValueError(f"{source} is damaged or not whole: it isn't uploaded. Build the cache anew.") from None
    notes = {key: value for key, value in (notes or {}).items() if key != b"ARROW:schema"}  # the schema, once more
    return check_data(source, [_decoded(one) for one in (notes, schema.metadata, *_notes_of_fields(schema))])


def _notes_of_fields(fields: Any) -> Iterator[Any]:
    for field in fields:
        yield field.metadata
        yield {b"name": field.name.encode()}
        if field.type.num_fields and hasattr(field.type, "field"):
            yield from _notes_of_fields([field.type.field(index) for index in range(field.type.num_fields)])


def _decoded(notes: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Notes of a Parquet file; those that are JSON as the data they hold."""
    decoded: dict[str, Any] = {}
    for key, value in (notes or {}).items():
        text = value.decode("utf-8", "replace")
        try:
            decoded[key.decode("utf-8", "replace")] = json.loads(text)
        except ValueError:
            decoded[key.decode("utf-8", "replace")] = text
    return decoded
