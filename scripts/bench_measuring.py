"""What the benchmarks share: seconds by turns, the peak of a process's memory, and the setting in words.

It knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import torch


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="of torch; one is the steadier measure on a busy machine")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")


def take_threads(count: int | None) -> None:
    """Put the number of threads in force, here and for the fresh processes; None leaves it."""
    if count:
        os.environ["OMP_NUM_THREADS"] = str(count)
        torch.set_num_threads(count)


def write_json(report: object, file: Path | None) -> None:
    """Write the figures, if a file was asked for."""
    if file:
        file.write_text(json.dumps(report, indent=2) + "\n")


def time_in_turns(runs: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Run all of them by turns (A B C A B C), so that a busy minute of the machine hits all alike.

    Args:
        runs: What to run, by name.
        repeats: How often.
        device: `cpu` or `cuda`; a GPU is waited for.

    Returns:
        Seconds of each run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            gc.collect()
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: str) -> None:
    """Wait for a GPU; a CPU is never ahead."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_above_now(run: Callable[[], object], device: str) -> int:
    """Bytes at the peak of a run above what was held before it.

    On a CPU this is the resident memory of the process, so call it in a fresh one; on Linux the peak so far is
    forgotten first, elsewhere a higher peak in the past makes the figure too small.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    before = _restart_peak()
    run()
    return _peak() - before


def _restart_peak() -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def in_fresh_process(function: Callable, *arguments: object, preload: Sequence[str] = ()) -> object:
    """Call a function of the script in a process of its own.

    Args:
        function: A function at the top level of the script.
        arguments: Its arguments.
        preload: Modules that the process should have loaded; where the system can, they are loaded once, in a process
            that runs nothing and from which the fresh ones are forked.

    Returns:
        What the function returns.
    """
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(list(preload))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def package_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def setting(device: str) -> str:
    """Machine and versions in a line."""
    if device.startswith("cuda"):
        machine = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        machine = f"{next(named, platform.machine())}, {torch.get_num_threads()} threads"
    packages = ("torch", "transformers", "trl", "peft", "hfkd")
    versions = (f"{name} {package_version(name) or 'not installed'}" for name in packages)
    return f"{machine}; {', '.join(versions)}"


def load() -> str:
    """How busy the machine is before we begin, in words; figures from a busy one are worth little."""
    if not hasattr(os, "getloadavg"):
        return ""
    return f"load of the machine in the last minute: {os.getloadavg()[0]:.1f} of {os.cpu_count()} processors"


def span(seconds: Sequence[float]) -> str:
    """The least and the most of some figures."""
    return f"{min(seconds):.3g} to {max(seconds):.3g}"


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown, the first column to the left."""
    widths = [max(len(row[place]) for row in (headings, *rows)) for place in range(len(headings))]
    rule = ["-" * width + (":" if place else "-") for place, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        return f"| {' | '.join(padded)} |"

    lines = [line(list(zip(row, widths, strict=True))) for row in (headings, *rows)]
    print_lines("", title, "", lines[0], f"|-{'|-'.join(rule)}|", *lines[1:], "")


def print_lines(*lines: str) -> None:
    """Print lines as they are, at once."""
    print(*lines, sep="\n", flush=True)


def print_targets(targets: Sequence[dict]) -> None:
    """Print each target's `words` and whether it was `met`."""
    print_lines(*(f"- {target['words']}: {'met' if target['met'] else 'NOT MET'}" for target in targets))
