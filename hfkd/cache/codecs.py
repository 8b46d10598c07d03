"""How a teacher's distribution is kept: its likeliest ids, ids drawn from it, or the hidden state that it is made of.

A codec first reads log-probabilities (or hidden states) of many tokens at once, then puts those of one text into a few
columns, and later makes rows for the losses out of the columns of several texts. Every codec is a function of the text
alone: which others stand beside it in a batch changes nothing but rounding. Formulas and errors: `docs/caching.md`.

Shapes: N tokens of several texts, n tokens of one, K entries of a token, V ids, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hfkd.cache.code import (
    BYTES,
    HALVES,
    IDS,
    Arrays,
    Codec,
    Columns,
    Reading,
    as_arrays,
    check_positive,
    error_in_words,
    joined,
    kept_values,
    read_ids,
)
from hfkd.cache.format import CacheError
from hfkd.cache.packing import bits_for, pack_ids, restore
from hfkd.cache.sampling import Sampled
from hfkd.rows import LOWEST, DenseRows, TopKRows


@dataclass(frozen=True)
class TopK(Codec):
    """The K likeliest ids with their log-probabilities, and the mass of all others.

    Error: plain log-probabilities are float16: off by at most 2^-11 of themselves. Compact ones lie at a distance d
    below the largest and are off by at most sqrt(d r) / 255 + r / 510^2, r the largest distance of the token, plus
    half a step of float16 at the largest. The tail is float16. What is read is scaled so that K entries and tail sum
    to 1, which moves all of a token by at most the largest of these errors.

    Args:
        k: How many.
        compact: Ids in as few bits as the vocabulary needs, log-probabilities in eight.
    """

    k: int = 64
    compact: bool = False
    kind: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        """Refuse what is no number of ids."""
        check_positive("k", self.k)

    @property
    def error(self) -> str:
        """See the class."""
        return error_in_words(self.compact)

    def describe(self) -> dict[str, Any]:
        """Kind, k and form."""
        return {"kind": self.kind, "k": self.k, "form": "compact" if self.compact else "plain"}

    def columns(self) -> dict[str, pa.DataType]:
        """Ids, log-probabilities, tail; of the compact form the bounds of the log-probabilities too."""
        if self.compact:
            return {"ids": BYTES, "log_probs": BYTES, "bounds": HALVES, "tail": HALVES}
        return {"ids": IDS, "log_probs": HALVES, "tail": HALVES}

    def bytes_per_token(self, vocab_size: int, hidden_size: int, itemsize: int) -> int:
        """Ids, log-probabilities, tail."""
        return self.k * (bits_for(vocab_size) + 8) // 8 + 7 if self.compact else 6 * self.k + 2

    def check(self, vocab_size: int) -> None:
        """Refuse more ids than there are."""
        if self.k > vocab_size:
            raise CacheError(f"codec.k is {self.k}, but the teacher has {vocab_size} ids; give at most that.")

    def tell(self, found: Tensor, draws: Tensor | None) -> Arrays:
        """Ids, log-probabilities and tail; `found` is used up."""
        self.check(found.shape[-1])
        values, ids = found.topk(self.k, dim=-1)
        rest = found.scatter_(-1, ids, float("-inf")).logsumexp(dim=-1)
        told = {"ids": ids.int(), "tail": rest.clamp(min=LOWEST).half()}
        return as_arrays(told | kept_values(values.clamp(min=LOWEST), self.compact))

    def pack(self, told: Arrays, vocab_size: int) -> Arrays:
        """All entries of a text one behind the other."""
        flat = {name: values.ravel() for name, values in told.items()}
        if self.compact:
            flat["ids"] = pack_ids(flat["ids"], bits_for(vocab_size))
        return flat

    def read(self, columns: Columns, tokens: Sequence[int], reading: Reading, device: torch.device) -> TopKRows:
        """Ids, log-probabilities and tail, which together sum to 1."""
        count = sum(tokens)
        ids = read_ids(columns["ids"], [self.k * each for each in tokens], self.compact, reading, device)
        values = joined(columns["log_probs"], device).view(count, self.k)
        if self.compact:
            values = restore(values, joined(columns["bounds"], device).view(count, 2))
        values = values.float()
        tail = joined(columns["tail"], device).float()
        whole = torch.logaddexp(values.logsumexp(dim=-1), tail)
        tail = None if self.k == reading.vocab_size else (tail - whole).clamp(min=LOWEST)
        values = (values - whole[:, None]).clamp(min=LOWEST)
        return TopKRows(ids.view(count, self.k), values, reading.vocab_size, reading.temperature, tail)


@dataclass(frozen=True)
class Hidden(Codec):
    """The last hidden state of each token; the teacher's head lies beside the shards, so nothing is lost but what a
    narrower type rounds off.

    Args:
        dtype: In which states are kept; `model` keeps the model's own.
    """

    dtype: Literal["model", "float32", "bfloat16", "float16"] = "model"
    kind: ClassVar[str] = "hidden"
    reads_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse an unknown type."""
        if self.dtype not in ("model", "float32", "bfloat16", "float16"):
            raise CacheError(f"codec.dtype is {self.dtype!r}; expected model, float32, bfloat16 or float16.")

    @property
    def error(self) -> str:
        """See the class."""
        return "exact" if self.dtype == "model" else f"hidden states are rounded to {self.dtype}, or exact in it"

    def describe(self) -> dict[str, Any]:
        """Kind and type."""
        return {"kind": self.kind, "dtype": self.dtype}

    def columns(self) -> dict[str, pa.DataType]:
        """The states of a text as bytes, since Parquet knows no bfloat16."""
        return {"hidden": pa.large_binary()}

    def bytes_per_token(self, vocab_size: int, hidden_size: int, itemsize: int) -> int:
        """H numbers."""
        return hidden_size * (itemsize if self.dtype == "model" else 4 if self.dtype == "float32" else 2)

    def tell(self, found: Tensor, draws: Tensor | None) -> Arrays:
        """The states in their type, as bytes [N, H * itemsize]."""
        states = found if self.dtype == "model" else found.to(getattr(torch, self.dtype))
        if not bool(torch.isfinite(states).all()):
            raise CacheError(
                f"A hidden state is no finite number in {self.dtype}; keep the states as they are (dtype model) or "
                "in bfloat16."
            )
        return {"hidden": states.contiguous().view(torch.uint8).cpu().numpy()}

    def pack(self, told: Arrays, vocab_size: int) -> Arrays:
        """All states of a text one behind the other."""
        return {"hidden": told["hidden"].ravel()}

    def read(self, columns: Columns, tokens: Sequence[int], reading: Reading, device: torch.device) -> DenseRows:
        """Hidden states, in the head's type."""
        kind, width = getattr(torch, reading.dtype), reading.head.weight.shape[1]
        found = np.concatenate(columns["hidden"])
        states = torch.from_numpy(found).view(kind) if found.size else torch.empty(0, dtype=kind)
        return DenseRows(states.to(device).view(sum(tokens), width).to(reading.head.weight.dtype), reading.head)


CODECS: dict[str, type[Codec]] = {codec.kind: codec for codec in (TopK, Sampled, Hidden)}
"""The codecs by the name that a manifest gives them."""


def make_codec(kind: str, **settings: Any) -> Codec:
    """Make a codec from what `describe` gave, or from the options of the command.

    Raises:
        CacheError: There is none of this kind, or it has no such setting.
    """
    if kind not in CODECS:
        raise CacheError(f"codec.kind is {kind!r}; expected one of {', '.join(CODECS)}.")
    form = settings.pop("form", None)
    if form is not None:
        settings["compact"] = form == "compact"
    try:
        return CODECS[kind](**settings)
    except TypeError:
        known = [name for name in CODECS[kind].__dataclass_fields__ if name != "kind"]
        raise CacheError(f"The codec {kind} has the settings {known}, got {sorted(settings)}.") from None
