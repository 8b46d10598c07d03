"""Numbers in few bits: ids bit by bit, log-probabilities in eight bits below the largest of their row.

Shapes: n tokens, K entries of a token, M entries of many tokens one behind the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hfkd.rows import LOWEST

LEVELS = 255
_WINDOW = 4  # bytes that hold an id of up to 25 bits wherever its first bit lies


def bits_for(vocab_size: int) -> int:
    """The number of bits of an id."""
    return max(1, (vocab_size - 1).bit_length())


def pack_ids(ids: np.ndarray, bits: int) -> np.ndarray:
    """Write ids [M] one behind the other, the lowest bit first; whole bytes as uint8."""
    places = np.arange(bits, dtype=np.uint32)
    found = (ids.astype(np.uint32)[:, None] >> places) & 1
    return np.packbits(found.astype(np.uint8).ravel(), bitorder="little")


def unpack_ids(pieces: Sequence[np.ndarray], counts: Sequence[int], bits: int, device: torch.device) -> Tensor:
    """Read what `pack_ids` wrote.

    Args:
        pieces: Bytes of each text.
        counts: Ids of each text; they sum to M.
        bits: Of an id.
        device: Where to unpack.

    Returns:
        [M] int64.
    """
    if bits == 16:
        words = torch.from_numpy(np.concatenate(pieces).view("<i2")).to(device)
        return words.long() & 0xFFFF
    sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
    many = np.asarray(counts, dtype=np.int64)
    first = (np.cumsum(sizes) - sizes) * 8 - (np.cumsum(many) - many) * bits
    starts = torch.from_numpy(np.repeat(first, many)).to(device)
    starts += torch.arange(len(starts), device=device) * bits
    data = torch.from_numpy(np.concatenate([*pieces, np.zeros(_WINDOW, np.uint8)])).to(device)
    place = starts >> 3
    word = data[place].long()
    for byte in range(1, (bits + 14) // 8):
        word |= data[place + byte].long() << (8 * byte)
    return (word >> (starts & 7)) & ((1 << bits) - 1)


def quantise(log_probs: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities in eight bits each, finest beside the largest.

    With m the largest of a token as float16, r >= max(m - x) as float16, the code of x is
    `round(255 sqrt((m - x) / r))`. Where an id of a token is ruled out, its code is 255, no other's is, and r is
    written below 0 to say so.

    Args:
        log_probs: [n, K], float32.
        real: [n, K] booleans, False where a token has fewer entries; None where all have K.

    Returns:
        [n, K] uint8 codes, and [n, 2] float16: m, and r or -r.
    """
    hidden = log_probs if real is None else log_probs.masked_fill(~real, float("-inf"))
    largest = hidden.amax(dim=-1, keepdim=True).half()
    distance = (largest.float() - log_probs).clamp(min=0.0)
    if real is not None:
        distance = distance * real
    never = distance > -LOWEST / 2  # ids that are ruled out: they must not stretch the others' range
    distance = distance.masked_fill(never, 0.0)
    barred = never.any(dim=-1, keepdim=True)
    farthest = distance.amax(dim=-1, keepdim=True) * torch.where(barred, (LEVELS / (LEVELS - 1)) ** 2, 1.0)
    reach = (farthest * (1 + 2**-10) + 2**-14).half()  # rounded up: no code is above 255, or 254 if an id is barred
    codes = (distance / reach.float()).sqrt_().mul_(LEVELS).round_().to(torch.uint8).masked_fill(never, LEVELS)
    return codes, torch.cat([largest, torch.where(barred, -reach, reach)], dim=-1)


def restore(codes: Tensor, bounds: Tensor) -> Tensor:
    """What `quantise` kept: `m - r (code / 255)^2`, float32, and `LOWEST` for what was ruled out.

    An entry at distance d below m is off by at most `sqrt(d r) / 255 + r / 255^2 / 4`, and one above m, which the
    rounding of m can leave, by half of float16's step at m.

    Args:
        codes: [n, K].
        bounds: [n, 2].
    """
    largest, reach = bounds[:, :1].float(), bounds[:, 1:].float()
    found = largest - reach.abs() * (codes.float() / LEVELS).square_()
    return found.masked_fill((reach < 0) & (codes == LEVELS), LOWEST)


def restored_error(log_probs: Tensor, bounds: Tensor) -> Tensor:
    """The bound that `restore` states, for each entry [n, K]."""
    largest, reach = bounds[:, :1].float(), bounds[:, 1:].float().abs()
    distance = (largest - log_probs.float()).clamp(min=0.0)
    return (distance * reach).sqrt() / LEVELS + reach / (4 * LEVELS**2) + largest.abs() * 2**-11 + 2**-20
