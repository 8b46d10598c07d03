"""What a codec is, and what codecs share.

Shapes: N tokens of several texts, n tokens of one, K entries of a token, V ids, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hfkd.cache.format import CacheError
from hfkd.cache.packing import bits_for, quantise, unpack_ids
from hfkd.rows import Head

Arrays = dict[str, np.ndarray]
Columns = Mapping[str, Sequence[np.ndarray]]
IDS, HALVES, BYTES = pa.list_(pa.int32()), pa.list_(pa.float16()), pa.binary()


@dataclass(frozen=True)
class Reading:
    """What a reader knows besides the columns.

    Args:
        vocab_size: The number V of ids.
        temperature: The distributions were taken at it.
        head: Of `hidden`, else None.
        dtype: In which `hidden` keeps its states, else None.
    """

    vocab_size: int
    temperature: float = 1.0
    head: Head | None = None
    dtype: str | None = None


class Codec(ABC):
    """A way to keep distributions."""

    kind: ClassVar[str]
    reads_logits: ClassVar[bool] = True
    drawn: ClassVar[bool] = False
    """Whether a distribution is known through drawn ids only."""

    @property
    @abstractmethod
    def error(self) -> str:
        """How far what is read may lie from what was written, in words."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain data from which `make_codec` makes it again."""

    @abstractmethod
    def columns(self) -> dict[str, pa.DataType]:
        """The columns of a shard, besides `row_hash` and `tokens`."""

    @abstractmethod
    def bytes_per_token(self, vocab_size: int, hidden_size: int, itemsize: int) -> int:
        """At most so many bytes does a token take."""

    def draws(self, key: str, tokens: int) -> np.ndarray | None:
        """Numbers that belong to a text, whatever stands beside it; [n, R] in [0, 1), or None."""
        return None

    def check(self, vocab_size: int) -> None:
        """Make sure, before anything is written, that distributions over so many ids can be kept.

        Raises:
            CacheError: They can't.
        """
        return None

    @abstractmethod
    def tell(self, found: Tensor, draws: Tensor | None) -> Arrays:
        """Keep of [N, V] log-probabilities (or [N, H] hidden states) what is to be written, [N, ...] each."""

    @abstractmethod
    def pack(self, told: Arrays, vocab_size: int) -> Arrays:
        """One array for each column from what was told of one text."""

    @abstractmethod
    def read(self, columns: Columns, tokens: Sequence[int], reading: Reading, device: torch.device) -> Any:
        """The rows of several texts, one behind the other.

        Args:
            columns: By name, an array for each text.
            tokens: Supervised tokens of each text.
            reading: What else there is to know.
            device: Where the rows shall be.
        """


def check_positive(name: str, value: Any) -> None:
    """Refuse a setting that is no whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CacheError(f"codec.{name} is {value!r}; expected a whole number from 1 on.")


def error_in_words(compact: bool) -> str:
    """The error of log-probabilities, for a manifest."""
    if not compact:
        return "log-probabilities are float16: |error| <= 2^-11 |log p|"
    return (
        "log-probabilities: |error| <= sqrt(d r) / 255 + r / 510^2 + 2^-11 |m|, m the token's largest, d the distance "
        "below it, r the largest distance"
    )


def kept_values(values: Tensor, compact: bool, real: Tensor | None = None) -> dict[str, Tensor]:
    """Log-probabilities [N, K] as they are written: float16, or codes with their bounds."""
    if not compact:
        return {"log_probs": values.half()}
    codes, bounds = quantise(values, real)
    return {"log_probs": codes, "bounds": bounds}


def as_arrays(told: Mapping[str, Tensor]) -> Arrays:
    """Tensors of any device as arrays."""
    return {name: tensor.cpu().numpy() for name, tensor in told.items()}


def joined(pieces: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """The arrays of several texts one behind the other, on a device."""
    return torch.from_numpy(np.concatenate(pieces)).to(device)


def read_ids(
    pieces: Sequence[np.ndarray], counts: Sequence[int], compact: bool, reading: Reading, device: torch.device
) -> Tensor:
    """[M] ids of several texts, `counts` of each."""
    if compact:
        return unpack_ids(pieces, counts, bits_for(reading.vocab_size), device)
    return joined(pieces, device).long()
