"""Numbers of rows that take a model to find: each process finds its share, all have them all, and the run's folder
keeps them for a run that is resumed.

Knows no transform; it is told what decides the numbers, and finds them anew where that is another.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from hfkd.distributed import total_over_processes
from hfkd.files import write_whole
from hfkd.transforms.base import Workshop

_FOLDER = "transforms"  # beside the weights of a run, where nothing takes these files for weights
_SAMPLES = 64


def row_figures(
    count: int,
    width: int,
    find: Callable[[int], Sequence[float]],
    workshop: Workshop,
    name: str,
    decided_by: Mapping[str, Any],
) -> np.ndarray:
    """Find some numbers for each row, or read those that were found before.

    All processes call it at once, and each makes as many calls of `find`, so that what `find` runs may be spread over
    them. A row's numbers come from one process alone, so that all decide alike by them.

    Args:
        count: Rows.
        width: The most numbers that a row has.
        find: Of the number of a row; fewer than `width` are filled up with 0.
        workshop: Its folder keeps the numbers, as `transforms/<name>-<digits>.safetensors`, the digits of what
            decides them: a run may have two transforms of one kind.
        name: Of the transform.
        decided_by: Plain data that decides the numbers.

    Returns:
        [count, width], the same on every process.

    Raises:
        ValueError: A number isn't finite.
    """
    state = PartialState()
    digest = hashlib.sha256(json.dumps(decided_by, sort_keys=True, default=str).encode()).hexdigest()
    file = f"{name}-{digest[:12]}.safetensors"
    path = None if workshop.folder is None else Path(workshop.folder) / _FOLDER / file
    kept = _read(path, digest, (count, width)) if state.is_main_process and path is not None else None
    if float(total_over_processes(float(kept is not None), state.device)):
        return _summed(np.zeros((count, width)) if kept is None else kept, state)
    here = np.zeros((count, width))
    for start in range(0, count, state.num_processes):
        row = start + state.process_index
        found = list(find(row % count))  # the last ones are found twice, so that each process makes as many calls
        if not all(map(math.isfinite, found)):
            raise ValueError(f"{name}: training row {row % count} gives {found}; expected finite numbers")
        if row < count:
            here[row, : len(found)] = found
    values = _summed(here, state)
    if state.is_main_process and path is not None:
        write_whole(path, save({"figures": torch.from_numpy(values)}, metadata={"digest": digest}))
    return values


def weights_digest(model: nn.Module) -> str:
    """What tells a model's weights from others: of each its name, its shape and some values all over it."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        flat = weight.detach().flatten()
        if flat.numel() and flat.device.type != "meta":
            some = flat[:: max(1, flat.numel() // _SAMPLES)]
            digest.update(some.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _summed(values: np.ndarray, state: PartialState) -> np.ndarray:
    return values if state.num_processes == 1 else total_over_processes(values, state.device).cpu().numpy()


def _read(path: Path, digest: str, shape: tuple[int, int]) -> np.ndarray | None:
    """The kept numbers; None where there are none, or those of something else."""
    try:
        with safe_open(path, framework="np") as kept:
            if (kept.metadata() or {}).get("digest") != digest:
                return None
            values = kept.get_tensor("figures")
    except (OSError, SafetensorError):
        return None
    return values if values.shape == shape else None
