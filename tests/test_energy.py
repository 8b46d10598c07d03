"""Energy: what counters say between two moments, over their wrap-around, and nothing where there is none."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from hfkd.energy import Counter, EnergyMeter, nvml_counters, rapl_counters


def domain(root: Path, folder: str, name: str, microjoules: object, wraps: int = 262_143_328_850) -> Path:
    """One of the kernel's folders."""
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{wraps}\n")
    return path


def count(path: Path, microjoules: int) -> None:
    (path / "energy_uj").write_text(f"{microjoules}\n")


def test_packages_and_their_memory_are_counted_once(tmp_path: Path) -> None:
    """Cores are a part of their package and the platform holds it: summed up they would double the figure."""
    first = domain(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    second = domain(tmp_path, "intel-rapl:1", "package-1", 5_000_000)
    core = domain(tmp_path, "intel-rapl:0:0", "core", 0)
    memory = domain(tmp_path, "intel-rapl:0:1", "dram", 0)
    platform = domain(tmp_path, "intel-rapl:2", "psys", 0)
    mirrored = domain(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    with EnergyMeter(root=tmp_path) as meter:
        count(first, 3_500_000)
        count(second, 6_000_000)
        count(memory, 250_000)
        for other in (core, platform, mirrored):
            count(other, 77_000_000)
    said = meter.to_dict()
    assert said["joules"] == 3.75
    assert said["devices"] == ["cpu package 0", "memory of cpu package 0", "cpu package 1"]
    assert said["source"] == "rapl" and said["seconds"] > 0


def test_a_counter_that_wraps_around(tmp_path: Path) -> None:
    """At 100 W a counter begins anew after three quarters of an hour: a plain difference would be negative."""
    package = domain(tmp_path, "intel-rapl:0", "package-0", 9_000_000, wraps=10_000_000)
    with EnergyMeter(root=tmp_path) as meter:
        count(package, 2_000_000)
        meter._read()
        count(package, 1_000_000)
    assert meter.to_dict()["joules"] == 3.0 + 9.0


def test_it_reads_while_it_waits() -> None:
    """Read only at both ends, a counter that wraps twice in a night hides most of the night."""
    seen, readings = threading.Event(), []

    def read() -> float:
        readings.append(len(readings))
        if len(readings) >= 4:
            seen.set()
        return float(len(readings))

    with EnergyMeter([Counter("a device", "test", read)], interval=0.01) as meter:
        assert seen.wait(5), "nobody read in between"
    assert meter.to_dict()["joules"] == len(readings) - 1
    assert not [thread for thread in threading.enumerate() if thread is meter._thread], "the thread has ended"


@pytest.mark.parametrize("content", ["", "words", None])
def test_what_cant_be_read_is_left_out(tmp_path: Path, content: str | None) -> None:
    """On most machines only root may read; a run must not fail of it, nor say 0 J."""
    package = domain(tmp_path, "intel-rapl:0", "package-0", 0)
    (package / "energy_uj").unlink() if content is None else (package / "energy_uj").write_text(content)
    assert rapl_counters(tmp_path) == []
    with EnergyMeter(root=tmp_path) as meter:
        pass
    assert meter.to_dict() == {}
    assert EnergyMeter(root=tmp_path / "none").to_dict() == {}


def test_a_counter_that_goes_away_is_left_out_as_a_whole(tmp_path: Path) -> None:
    """Half a run's energy under the name of the whole is a wrong figure."""
    lost = domain(tmp_path, "intel-rapl:0", "package-0", 0)
    kept = domain(tmp_path, "intel-rapl:1", "package-1", 0)
    with EnergyMeter(root=tmp_path) as meter:
        (lost / "energy_uj").unlink()
        count(kept, 2_000_000)
    assert meter.to_dict()["joules"] == 2.0 and meter.to_dict()["devices"] == ["cpu package 1"]


def test_an_error_in_the_run_goes_on_its_way(tmp_path: Path) -> None:
    """A meter that swallows an error turns a failed run into a finished one."""
    domain(tmp_path, "intel-rapl:0", "package-0", 0)
    with pytest.raises(KeyError), EnergyMeter(root=tmp_path):
        raise KeyError


def fake_gpu(monkeypatch: pytest.MonkeyPatch, energy: dict[str, int], shown: list[str]) -> None:
    """NVML with GPUs by their ids, of which torch is shown some."""
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: energy[handle],
    )
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: len(shown),
        get_device_properties=lambda index: SimpleNamespace(uuid=shown[index], name="NVIDIA H200"),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0")))


def test_the_gpus_that_torch_sees_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared machine NVML lists everybody's GPUs, and in another order than torch."""
    energy = {"GPU-aa": 1_000, "GPU-bb": 5_000, "GPU-cc": 0}
    fake_gpu(monkeypatch, energy, ["bb", "GPU-cc"])
    domain(tmp_path, "intel-rapl:0", "package-0", 0)
    with EnergyMeter(root=tmp_path) as meter:
        energy.update({"GPU-aa": 900_000, "GPU-bb": 7_500, "GPU-cc": 1_000})
    said = meter.to_dict()
    assert said["joules"] == 3.5 and said["source"] == "rapl+nvml"
    assert said["devices"] == ["cpu package 0", "NVIDIA H200 0", "NVIDIA H200 1"]


def test_no_library_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pynvml` is nobody's requirement."""
    fake_gpu(monkeypatch, {}, ["aa"])
    assert nvml_counters() == [], "a GPU that counts nothing"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml_counters() == []
    monkeypatch.delitem(sys.modules, "torch")
    assert nvml_counters() == []
