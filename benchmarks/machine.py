"""What makes a timing differ from yesterday's on the same machine, and what else ran meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["BUSY_SHARE", "VECTOR_UNITS", "Watch", "describe_conditions"]

VECTOR_UNITS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""Processor flags (x86 and Arm, as Linux names them) that decide which kernels run."""
BUSY_SHARE = 0.05
"""Share of the machine's processor time that others may take before a report says so."""


def describe_conditions(root: Path = Path("/")) -> dict[str, Any]:
    """Return affinity, vector units, frequency policy, limits and load; None where not readable.

    Parameters
    ----------
    root : where ``proc`` and ``sys`` are mounted; for tests.
    """
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    flags = _flags(root / "proc/cpuinfo")
    maximum = _text(frequency / "scaling_max_freq")
    return {
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "vector_units": [unit for unit in VECTOR_UNITS if unit in flags],
        "governor": _text(frequency / "scaling_governor"),
        "max_mhz": int(maximum) / 1000 if maximum and maximum.isdecimal() else None,
        "turbo": _turbo(root),
        "cgroup_cpu_quota": _text(root / "sys/fs/cgroup/cpu.max"),
        "hypervisor": "hypervisor" in flags,
        "load_average_start": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


class Watch:
    """Measures which share of the machine's processor time others took between start and stop."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._stat = root / "proc/stat"
        self._start = self._read()

    def stop(self) -> dict[str, Any]:
        """Return ``other_cpu_share`` (0..1; None where unknown) and the load average at the end."""
        end = self._read()
        share = None
        if self._start is not None and end is not None and end[0] > self._start[0]:
            total, busy, own = (b - a for a, b in zip(self._start, end, strict=True))
            share = round(min(1.0, max(0.0, (busy - own) / total)), 4)
        return {
            "other_cpu_share": share,
            "load_average_end": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        }

    def _read(self) -> tuple[float, float, float] | None:
        """Return total, busy and own processor seconds, children that have ended included."""
        line = (_text(self._stat) or "").partition("\n")[0].split()
        if len(line) < 6 or line[0] != "cpu":
            return None
        ticks = [int(value) for value in line[1:9]]  # guest time is part of user time already
        unit = os.sysconf("SC_CLK_TCK")
        total, idle = sum(ticks) / unit, (ticks[3] + ticks[4]) / unit
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return total, total - idle, own


def _flags(path: Path) -> set[str]:
    for line in (_text(path) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def _turbo(root: Path) -> bool | None:
    no_turbo = _text(root / "sys/devices/system/cpu/intel_pstate/no_turbo")
    if no_turbo is not None:
        return no_turbo == "0"
    boost = _text(root / "sys/devices/system/cpu/cpufreq/boost")
    return None if boost is None else boost == "1"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # not this kind of machine, or not for this user: unknown, and said so
        return None
