"""The codec of drawn ids: few for each token, and right on average.

Shapes: N tokens of several texts, K distinct ids of a token, V ids.

Paper:
    Anshumann et al. (Sparse Logit Sampling), 2025, https://arxiv.org/abs/2503.16870.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
from hfkd.rows import LOWEST
from hfkd.teacher_rows import SampledRows


@dataclass(frozen=True)
class Sampled(Codec):
    """Ids drawn with replacement from q proportional to p ** power, each with the number of times it came up.

    The weight of an id is `count p / (q rounds)`, so that sums over a teacher's distribution are right on average.
    With power 1 that is `count / rounds`, and the log-probabilities, which have the errors of `TopK`, play no part in
    it; otherwise an error e of log p changes the weight by the factor exp((1 - power) e).

    Args:
        rounds: Draws for each token.
        power: Of the proposal, > 0; below 1 rare ids are drawn more often.
        compact: As in `TopK`.
        seed: Of the draws, which are a function of it and of the text alone.
    """

    rounds: int = 50
    power: float = 1.0
    compact: bool = False
    seed: int = 0
    kind: ClassVar[str] = "sampled"
    drawn: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what can't be drawn."""
        check_positive("rounds", self.rounds)
        if self.rounds > 65535 or not 0 < self.power < float("inf"):
            raise CacheError(
                f"codec.rounds is {self.rounds} and codec.power {self.power}; expected at most 65535 draws and a "
                "finite power above 0."
            )

    @property
    def error(self) -> str:
        """See the class."""
        return "weights: unbiased over draws. " + error_in_words(self.compact)

    def describe(self) -> dict[str, Any]:
        """Kind, draws, proposal, seed and form."""
        form = "compact" if self.compact else "plain"
        return {"kind": self.kind, "rounds": self.rounds, "power": self.power, "seed": self.seed, "form": form}

    def columns(self) -> dict[str, pa.DataType]:
        """Ids, how often each was drawn, how many a token has, log-probabilities, and the proposal's normaliser."""
        columns = {"distinct": BYTES, "counts": BYTES, "ids": BYTES if self.compact else IDS}
        columns["log_probs"] = BYTES if self.compact else HALVES
        if self.compact:
            columns["bounds"] = HALVES
        if self.power != 1.0:
            columns["normaliser"] = pa.list_(pa.float32())
        return columns

    def bytes_per_token(self, vocab_size: int, hidden_size: int, itemsize: int) -> int:
        """As if all draws were of different ids."""
        one = self._count_type.itemsize
        entry = one + ((bits_for(vocab_size) + 15) // 8 if self.compact else 6)
        return self.rounds * entry + one + (4 if self.compact else 0) + (4 if self.power != 1.0 else 0)

    def draws(self, key: str, tokens: int) -> np.ndarray:
        """Numbers of a generator that is seeded by the seed and the text."""
        digest = hashlib.sha256(f"{self.seed}/{key}".encode()).digest()
        return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little"))).random(
            (tokens, self.rounds)
        )

    def tell(self, found: Tensor, draws: Tensor | None) -> Arrays:
        """Ids in rising order, padded behind `distinct`."""
        scaled = found if self.power == 1.0 else found * self.power
        normaliser = scaled.logsumexp(dim=-1)
        mass = scaled.double().sub_(normaliser.double()[:, None]).exp_().cumsum_(dim=-1)
        total = mass[:, -1:].clone()
        drawn = torch.searchsorted(mass, draws * total, right=True).clamp_(max=found.shape[-1] - 1)
        drawn = drawn.sort(dim=-1).values
        fresh = torch.ones_like(drawn, dtype=torch.bool)
        fresh[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        place = fresh.long().cumsum(dim=-1) - 1
        ids = torch.zeros_like(drawn).scatter_(-1, place, drawn)
        counts = torch.zeros_like(drawn).scatter_add_(-1, place, torch.ones_like(drawn))
        distinct = place[:, -1] + 1
        values = found.gather(-1, ids).clamp(min=LOWEST)
        told = {"ids": ids.int(), "counts": counts.int(), "distinct": distinct.int(), "normaliser": normaliser.float()}
        return as_arrays(told | kept_values(values, self.compact, counts > 0))

    def pack(self, told: Arrays, vocab_size: int) -> Arrays:
        """The entries that there are, one behind the other."""
        real = told["counts"] > 0
        ids = told["ids"][real]
        packed = {
            "distinct": told["distinct"].astype(self._count_type),
            "counts": told["counts"][real].astype(self._count_type),
            "ids": pack_ids(ids, bits_for(vocab_size)) if self.compact else ids,
            "log_probs": told["log_probs"][real],
        }
        if self.compact:
            packed["bounds"] = told["bounds"].ravel()
        if self.power != 1.0:
            packed["normaliser"] = told["normaliser"]
        return packed

    def read(self, columns: Columns, tokens: Sequence[int], reading: Reading, device: torch.device) -> SampledRows:
        """Ids with true log-probabilities and weights; zeros where a token has fewer than others."""
        each = [piece.view(self._count_type).astype(np.int64) for piece in columns["distinct"]]
        distinct = torch.from_numpy(np.concatenate(each)).to(device)
        most = max((int(piece.max(initial=0)) for piece in each), default=0)
        real = torch.arange(most, device=device) < distinct[:, None]
        ids = read_ids(columns["ids"], [int(piece.sum()) for piece in each], self.compact, reading, device)
        counted = np.concatenate([piece.view(self._count_type) for piece in columns["counts"]]).astype(np.float32)
        counts = _spread(torch.from_numpy(counted).to(device), real)
        values = _spread(joined(columns["log_probs"], device), real)
        if self.compact:
            values = restore(values, joined(columns["bounds"], device).view(len(real), 2)) * real
        values, weights = values.float(), counts / self.rounds
        if self.power != 1.0:
            normaliser = joined(columns["normaliser"], device)[:, None]
            weights = weights * ((1 - self.power) * values + normaliser).exp()
        return SampledRows(_spread(ids, real), values, weights, reading.vocab_size, reading.temperature)

    @property
    def _count_type(self) -> np.dtype:
        return np.dtype(np.uint8 if self.rounds < 256 else "<u2")


def _spread(flat: Tensor, real: Tensor) -> Tensor:
    """[N, K] with the entries [M] where `real` is, and zeros elsewhere."""
    return torch.zeros(real.shape, dtype=flat.dtype, device=flat.device).masked_scatter_(real, flat)
