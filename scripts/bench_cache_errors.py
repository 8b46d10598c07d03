"""What the codecs of a cache lose, for `bench_cache.py`: the same tokens read from the cache and from the teacher.

With p the teacher, q the student and c what is read from the cache, for each supervised token:

- `dense`: KL(p || q) over the whole vocabulary;
- `cached`: what `forward_kl` makes of the cache's rows: over K ids and a tail bucket (topk), over drawn ids with their
  weights (sampled), over the whole vocabulary (hidden);
- `error`: |cached - dense|, and `bias`: cached - dense, means over the tokens;
- `decoded`: KL(p || c), where the tail mass of topk is spread evenly over the ids that aren't listed. It isn't defined
  for drawn ids, because c gives 0 to what was never drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from bench_measuring import print_lines, print_table
from torch import Tensor, nn

from hfkd.batch import Batch, View
from hfkd.cache import Codec, Hidden, Sampled, TopK, texts_of
from hfkd.cache.writer import pad_view
from hfkd.data.views import DistillationDataset
from hfkd.losses.kl import ForwardKL, kl
from hfkd.rows import DenseRows, Head, TopKRows, decode, supervised
from hfkd.support import TokenChunk
from hfkd.teacher_rows import SampledRows
from hfkd.teachers.cached import CachedTeacher

_TOP = {f"topk K={k}{form}": TopK(k, bool(form)) for form in ("", ", compact") for k in (8, 16, 32, 64, 128)}
_DRAWN = {f"sampled {n}{form}": Sampled(n, compact=bool(form)) for form in ("", ", compact") for n in (12, 50, 200)}
CODECS: dict[str, Codec] = {
    **_TOP,
    **_DRAWN,
    **{f"hidden {dtype}": Hidden(dtype) for dtype in ("float32", "bfloat16")},
}
BLOCK = 32
"""Tokens whose logits are held at once."""

Rows = DenseRows | TopKRows | SampledRows


def measure_errors(
    speak: Callable[[View], DenseRows],
    students: Mapping[str, nn.Module],
    data: DistillationDataset,
    caches: Mapping[str, Path],
    batch: int,
) -> dict[str, Any]:
    """Read the same tokens from each cache and from the teacher.

    Args:
        speak: The teacher itself.
        students: Whose divergence from it is measured, by name.
        data: The texts that the caches hold.
        caches: Folders, by codec.
        batch: Texts that are run together.

    Returns:
        Means in nats per token: `dense` of each student, and of each codec `decoded` (None where it isn't defined),
        and for each student `cached`, `error`, `bias` and the standard error of `bias`.
    """
    readers = {name: CachedTeacher(folder) for name, folder in caches.items()}
    for reader in readers.values():
        reader.prepare(Accelerator(cpu=True), nn.Identity())
        reader.meet(data)
    dense: dict[str, list[Tensor]] = {name: [] for name in students}
    cached = {codec: {name: [] for name in students} for codec in caches}
    decoded: dict[str, list[Tensor]] = {codec: [] for codec in caches}
    for teacher, rows, ours, targets in _blocks(speak, students, data, readers, batch):
        truth = teacher.log_softmax(dim=-1)
        for codec, known in rows.items():
            found = decode_rows(known)
            if found is not None:
                decoded[codec].append(kl(truth, found))
            read = _logits(known) if isinstance(known, DenseRows) else known
            for name, logits in ours.items():
                cached[codec][name].append(ForwardKL()(TokenChunk(targets, logits, read)))
        for name, logits in ours.items():
            dense[name].append(ForwardKL()(TokenChunk(targets, logits, teacher)))
    whole = {name: torch.cat(values) for name, values in dense.items()}
    return {
        "dense": {name: float(values.mean()) for name, values in whole.items()},
        "codecs": {
            codec: {
                "decoded": float(torch.cat(decoded[codec]).mean()) if decoded[codec] else None,
                "students": {name: _compare(torch.cat(values), whole[name]) for name, values in found.items()},
            }
            for codec, found in cached.items()
        },
    }


def _compare(cached: Tensor, dense: Tensor) -> dict[str, float]:
    gap = cached - dense
    deviation = float(gap.std()) / math.sqrt(len(gap))
    figures = {"cached": cached.mean(), "error": gap.abs().mean(), "bias": gap.mean()}
    return {**{name: float(value) for name, value in figures.items()}, "bias_error": deviation}


@torch.no_grad()
def _blocks(
    speak: Callable[[View], DenseRows],
    students: Mapping[str, nn.Module],
    data: DistillationDataset,
    readers: Mapping[str, CachedTeacher],
    batch: int,
) -> Iterator[tuple[Tensor, dict[str, Rows], dict[str, Tensor], Tensor]]:
    """A few tokens at a time: the teacher's logits, the rows of each cache, the students' logits, the targets."""
    texts, device = list(texts_of(data)), next(next(iter(students.values())).parameters()).device
    for start in range(0, len(texts), batch):
        view = pad_view(texts[start : start + batch], 0, device)
        teacher = speak(view)
        rows = {name: reader.signal(Batch(view), frozenset({"distribution"})).rows for name, reader in readers.items()}
        hidden = {
            name: supervised(decode(one, view.input_ids, view.attention_mask).last_hidden_state, view.labels)
            for name, one in students.items()
        }
        for first in range(0, len(teacher), BLOCK):
            which = slice(first, first + BLOCK)
            ours = {name: Head.of(students[name]).logits(states[which]).float() for name, states in hidden.items()}
            some = {name: select(known, which) for name, known in rows.items()}
            yield _logits(select(teacher, which)), some, ours, view.targets[which]


def select(rows: Rows, which: slice) -> Rows:
    """Some of the rows."""
    return DenseRows(rows.hidden[which], rows.head) if isinstance(rows, DenseRows) else rows.select(which)


def _logits(rows: DenseRows) -> Tensor:
    return rows.head.logits(rows.hidden).float()


def decode_rows(rows: Rows) -> Tensor | None:
    """[n, V] log-probabilities of what was kept, the tail spread evenly over the ids that aren't listed; None for
    drawn ids.
    """
    if isinstance(rows, DenseRows):
        return _logits(rows).log_softmax(dim=-1)
    if isinstance(rows, SampledRows):
        return None
    others = rows.vocab_size - rows.ids.shape[1]
    even = rows.tail - math.log(others) if others else rows.log_probs[:, 0]
    return even[:, None].repeat(1, rows.vocab_size).scatter_(-1, rows.ids, rows.log_probs)


def report_errors(found: Mapping[str, Any], tokens: int) -> None:
    """Print bytes against errors."""
    names = list(found["dense"])
    headings = ["codec", "bytes per token at most", "on disk", "KL(teacher || cache)"]
    headings += [f"{what}, {name}" for name in names for what in ("mean abs. error", "error of the mean")]
    rows = []
    for codec, entry in found["codecs"].items():
        decoded = "-" if entry["decoded"] is None else f"{entry['decoded']:.2g}"
        size = found["bytes_per_token"][codec]
        cells = [codec, f"{size['most']:,}", f"{size['disk']:,.1f}", decoded]
        for name in names:
            one = entry["students"][name]
            cells += [f"{one['error']:.2g}", f"{one['bias']:+.2g} +- {one['bias_error']:.1g}"]
        rows.append(cells)
    print_table(f"What is lost, in nats per token, over {tokens:,} held-out tokens", headings, rows)
    dense = ", ".join(f"{value:.3f} for the student {name}" for name, value in found["dense"].items())
    print_lines(
        f"- KL(teacher || student) from the teacher itself: {dense}",
        "- on disk: compressed, with what Parquet and the names of texts take",
        "- KL(teacher || cache): the tail of topk spread evenly over the ids that aren't listed; none for drawn ids, "
        "which leave 0 for what was never drawn",
        "- error: of forward KL read from the cache against the same from the teacher itself, token by token and of "
        "the mean over all tokens (with its standard error)",
    )
