"""How much energy the devices of a run used: counters of the CPU packages (RAPL) and of NVIDIA GPUs.

A counter belongs to a whole device: whatever else ran there is in its figure, and what has no counter (fans, disks,
the power supply, often the memory) is in none. Only this machine is read. Where no counter can be read, which on Linux
is the rule for anybody but root, nothing is said.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """One device's count of energy.

    Attributes:
        device: What is measured, in words.
        source: Who counts: `rapl` or `nvml`.
        read: Joules since some moment; raises where that can't be read any more.
        wraps_at: Joules at which it begins at 0 again; None where it doesn't.
    """

    device: str
    source: str
    read: Callable[[], float]
    wraps_at: float | None = None


class EnergyMeter:
    """Joules that the devices use while a `with` block runs.

    A CPU's counter begins anew after some minutes under load, so a thread reads them all the while.

    Args:
        counters: What is read; None takes every counter of this machine that can be read.
        root: The folder of the kernel's counters.
        interval: Seconds between two readings; must be shorter than the time in which a counter wraps around.

    Example:
        >>> with EnergyMeter([Counter("a lamp", "none", iter([1.0, 4.0]).__next__)]) as meter:
        ...     pass
        >>> meter.to_dict()["joules"], meter.to_dict()["devices"]
        (3.0, ['a lamp'])
    """

    def __init__(
        self, counters: Sequence[Counter] | None = None, *, root: Path = POWERCAP, interval: float = 30.0
    ) -> None:
        self._counters = [*rapl_counters(root), *nvml_counters()] if counters is None else list(counters)
        self._interval = interval
        self._last: dict[str, float] = {}
        self._used: dict[str, float] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        self._began = self._seconds = 0.0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> EnergyMeter:
        self._began = time.perf_counter()
        self._read()
        if self._last:
            self._thread = threading.Thread(target=self._keep_reading, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._read()
        self._seconds = time.perf_counter() - self._began

    def to_dict(self) -> dict[str, Any]:
        """`joules`, `devices`, `source` and `seconds`; empty where no counter could be read to the end."""
        counted = [counter for counter in self._counters if counter.device in self._used]
        if not counted or not self._seconds:
            return {}
        return {
            "joules": round(sum(self._used[counter.device] for counter in counted), 3),
            "devices": [counter.device for counter in counted],
            "source": "+".join(dict.fromkeys(counter.source for counter in counted)),
            "seconds": round(self._seconds, 3),
        }

    def _keep_reading(self) -> None:
        while not self._over.wait(self._interval):
            self._read()

    def _read(self) -> None:
        """Add what was used since the last reading; a counter that fails is left out as a whole."""
        with self._lock:
            for counter in list(self._counters):
                try:
                    now = float(counter.read())
                except Exception:  # a driver that went away, a file that may not be read: no figure, no failed run
                    self._counters.remove(counter)
                    self._used.pop(counter.device, None)
                    continue
                passed = now - self._last.get(counter.device, now)
                if passed < 0:
                    passed = passed + counter.wraps_at if counter.wraps_at else 0.0
                self._used[counter.device] = self._used.get(counter.device, 0.0) + passed
                self._last[counter.device] = now


def rapl_counters(root: Path = POWERCAP) -> list[Counter]:
    """The counters of the CPU packages, and of their memory where that is counted by itself; whatever else the kernel
    lists (cores, the whole platform) is a part of these or holds them.
    """
    found = []
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
            wraps = int((folder / "max_energy_range_uj").read_text()) / 1e6
            _microjoules(folder)
        except (OSError, ValueError):
            continue
        package = folder.name.split(":")[1]
        if name.startswith("package"):
            device = f"cpu package {name.removeprefix('package').lstrip('-') or package}"
        elif name == "dram":
            device = f"memory of cpu package {package}"
        else:
            continue
        found.append(Counter(device, "rapl", lambda folder=folder: _microjoules(folder) / 1e6, wraps))
    return found


def _microjoules(folder: Path) -> int:
    return int((folder / "energy_uj").read_text())


def nvml_counters() -> list[Counter]:
    """The counters of the GPUs that this process sees; none without `pynvml`, or where torch isn't loaded."""
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_available() or torch.version.cuda is None:
            return []
        import pynvml

        pynvml.nvmlInit()
        return [_nvml_counter(pynvml, torch, index) for index in range(torch.cuda.device_count())]
    except Exception:  # no library, no driver, a GPU that counts nothing
        return []


def _nvml_counter(pynvml: Any, torch: Any, index: int) -> Counter:
    properties = torch.cuda.get_device_properties(index)
    uuid = str(properties.uuid)
    # By its id, since NVML counts all GPUs of the machine and torch only those that it is shown.
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3  # noqa: E731
    read()
    name = properties.name if torch.cuda.device_count() == 1 else f"{properties.name} {index}"
    return Counter(name, "nvml", read)
