"""Which files of a folder may be uploaded: those on a list. Whatever else lies there stays where it is.

So an optimizer's state, a checkpoint, rows of data, a pickle of settings or a `.env` is not left out but never taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from hfkd.uploads.contents import PAGES, gone_over

INDEX = "model.safetensors.index.json"
_ONE, _PART = "model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors"
WEIGHTS = (
    *("adapter_model.safetensors", "adapter_config.json"),
    *(_ONE, INDEX, _PART),
    *("config.json", "generation_config.json"),
)
"""What a model, or an adapter, is loaded from."""
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "spm.model"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
)
"""What a tokenizer is loaded from."""
RUN = (*PAGES, "plots/*.png")
"""What a run says of itself."""


@dataclass(frozen=True)
class Upload:
    """One file of a repository.

    Attributes:
        path: Its name there.
        content: The file on this machine, or its bytes.
        masked: What was masked in it, in words; empty where nothing was.
    """

    path: str
    content: Path | bytes
    masked: str = ""

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def collect(folder: Path, patterns: Iterable[str] = (*WEIGHTS, *TOKENIZER, *RUN)) -> list[Upload]:
    """The files of a folder that are on the list, gone over.

    Args:
        folder: Of a model or of a run.
        patterns: Names below the folder, `*` within one name.

    Returns:
        In the order of the patterns, then by name.

    Raises:
        ValueError: A file is a link or lies behind one, holds a secret or a path, or is damaged; or the weights aren't
            those that their index names.
    """
    uploads = []
    for path in _listed(folder, patterns):
        if _is_linked(path, folder):
            raise ValueError(f"{path} is a link, and what it leads to isn't on the list: put a copy in its place.")
        content, masked = gone_over(path)
        uploads.append(Upload(path.relative_to(folder).as_posix(), content, masked))
    return uploads


def owned_by(uploads: Sequence[Upload]) -> tuple[str, ...]:
    """Patterns of what an earlier push may have left in a repository, and what would be loaded with these files."""
    with_tokenizer = any(fnmatchcase(one.path, pattern) for one in uploads for pattern in TOKENIZER)
    return (*WEIGHTS, *TOKENIZER) if with_tokenizer else WEIGHTS


def _is_linked(path: Path, folder: Path) -> bool:
    """Whether a file, or a folder that it lies in, is a link; that of the run may be one."""
    return any(one.is_symlink() for one in (path, *path.parents) if one.is_relative_to(folder) and one != folder)


def _listed(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    shards = _shards(folder)
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and (path.name in shards or "-of-" not in path.name):
                yield path


def _shards(folder: Path) -> set[str]:
    """The parts that the index of the weights names; others are of another save.

    Raises:
        ValueError: One of them isn't there or has another name, weights in one file lie there too, or the index is
            damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        return set()
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is damaged. Write the weights anew.") from None
    if other := sorted(str(name) for name in names if not fnmatchcase(str(name), _PART)):
        raise ValueError(
            f"{index} names {other[0]}; expected parts like model-00001-of-00002.safetensors, which are the ones that "
            "are uploaded. Write the weights anew with `save_pretrained`."
        )
    if (folder / _ONE).is_file():
        raise ValueError(f"{folder} holds {_ONE} and {INDEX} with its parts; delete what is of an earlier save.")
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise ValueError(f"{index} names {missing[0]}, which isn't in {folder}: the weights aren't whole.")
    return names
