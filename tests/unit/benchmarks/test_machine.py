"""Conditions and energy, from trees that look like ``/proc`` and ``/sys``."""

from __future__ import annotations

import os
from mmap import PROT_READ, mmap
from pathlib import Path
from time import sleep

import cv2

from recallseg.benchmarks.energy import find_meter
from recallseg.benchmarks.machine import Watch, describe_conditions
from recallseg.benchmarks.resident import held_bytes, resident_bytes, resident_peak


def write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_conditions(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", "model name\t: X\nflags\t\t: fpu avx2 avx512_vnni hypervisor\n")
    cpu = "sys/devices/system/cpu"
    write(tmp_path, f"{cpu}/cpu0/cpufreq/scaling_governor", "powersave\n")
    write(tmp_path, f"{cpu}/cpu0/cpufreq/scaling_max_freq", "3500000\n")
    write(tmp_path, f"{cpu}/intel_pstate/no_turbo", "1\n")
    found = describe_conditions(tmp_path)
    assert found["vector_units"] == ["avx2", "avx512_vnni"]
    assert (found["governor"], found["max_mhz"], found["turbo"]) == ("powersave", 3500.0, False)
    assert found["hypervisor"] is True
    assert found["cgroup_cpu_quota"] is None


def test_conditions_unknown(tmp_path: Path) -> None:
    found = describe_conditions(tmp_path)
    assert found["vector_units"] == []
    assert found["governor"] is found["max_mhz"] is found["turbo"] is None


def test_others_share_of_the_processor(tmp_path: Path) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    write(tmp_path, "proc/stat", "cpu  0 0 0 0 0 0 0 0 0 0\n")
    watch = Watch(tmp_path)
    write(tmp_path, "proc/stat", f"cpu  {1000 * tick} 0 0 {3000 * tick} 0 0 0 0 0 0\n")
    assert watch.stop()["other_cpu_share"] == 0.25 or watch.stop()["other_cpu_share"] > 0.249
    assert Watch(tmp_path / "nowhere").stop()["other_cpu_share"] is None


def test_rapl_counts_packages_once_and_wraps_around(tmp_path: Path) -> None:
    base = "sys/class/powercap"
    counters = []
    for i, start in enumerate((100, 999_000_000)):
        write(tmp_path, f"{base}/intel-rapl:{i}/max_energy_range_uj", "1000000000")
        counters.append(write(tmp_path, f"{base}/intel-rapl:{i}/energy_uj", str(start)))
    write(tmp_path, f"{base}/intel-rapl:0:0/max_energy_range_uj", "1000000000")
    write(tmp_path, f"{base}/intel-rapl:0:0/energy_uj", "5")
    meter = find_meter(tmp_path)
    assert meter is not None
    assert meter.source == "RAPL, 2 packages"
    meter.start()
    counters[0].write_text("3000100")
    counters[1].write_text("1000000")  # past its range: 2 J
    assert meter.stop() == 3.0 + 2.0


def test_ina3221_integrates_power(tmp_path: Path) -> None:
    monitor = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    write(tmp_path, f"{monitor}/in1_label", "VDD_IN\n")
    write(tmp_path, f"{monitor}/in1_input", "5000\n")
    write(tmp_path, f"{monitor}/curr1_input", "2000\n")
    write(tmp_path, f"{monitor}/in2_label", "VDD_CPU_GPU_CV\n")
    meter = find_meter(tmp_path)
    assert meter is not None
    meter.start()
    sleep(0.1)
    joules = meter.stop()
    meter.close()
    assert 0.9 < joules < 30.0  # 10 W for 0.1 s, or longer on a busy machine


def test_no_sensor(tmp_path: Path) -> None:
    assert find_meter(tmp_path) is None


def test_resident_memory_sees_an_allocation() -> None:
    before = resident_bytes()
    block = mmap(-1, 32 << 20)  # pages of its own: an allocator may have freed ones at hand
    block.write(os.urandom(1 << 20) * 32)
    after, peak = resident_bytes(), resident_peak()
    assert before is not None
    assert after is not None
    assert peak is not None
    assert after - before > 24 << 20
    assert peak >= after


def test_what_the_system_may_drop_is_not_held() -> None:
    # Of an installed package: a temporary folder may lie in memory, and its files are held.
    largest = max(Path(cv2.__file__).parent.glob("*.so"), key=lambda path: path.stat().st_size)
    held, resident, size = held_bytes(), resident_bytes(), largest.stat().st_size
    assert held is not None
    assert resident is not None
    with largest.open("rb") as file:
        library = mmap(file.fileno(), 0, prot=PROT_READ)
    assert sum(library[:: 1 << 12])
    mapped, now = held_bytes(), resident_bytes()
    assert mapped is not None
    assert now is not None
    assert now - resident > size // 2
    assert mapped - held < size // 4
    block = mmap(-1, 32 << 20)
    block.write(os.urandom(1 << 20) * 32)
    taken = held_bytes()
    assert taken is not None
    assert taken - mapped > 24 << 20
    assert len(block) == 32 << 20
