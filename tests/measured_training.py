"""Train a recipe in a process of its own and print what it took: `python measured_training.py RECIPE`.

Peak resident memory over what the process held when everything was imported and had run once on a tiny model, in
bytes. What tensors take is most of it. The parent has the allocator give freed memory back at once
(`MALLOC_MMAP_THRESHOLD_`): left to itself, glibc keeps up to a seventh more, depending on sizes and order.
"""

from __future__ import annotations

import ctypes
import gc
import io
import sys
from pathlib import Path

from rich.console import Console

from hfkd.recipe import load_recipe
from hfkd.run import run_recipe

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(name: str) -> int:
    """VmRSS, or VmHWM for the most since it was last reset; bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def train(path: str, *overrides: str) -> None:
    """Run a recipe in silence."""
    run_recipe(load_recipe(path, overrides), console=Console(file=io.StringIO()))


def main(path: str) -> int:
    """Bytes that the run took at its peak."""
    train(path, "student.model=tiny", "teacher.model=tiny", "training.output_dir=warm", "data.train.size=4")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # the peak is forgotten
    before = resident("VmRSS")
    train(path)
    return resident("VmHWM") - before


if __name__ == "__main__":
    print("took", main(sys.argv[1]))
