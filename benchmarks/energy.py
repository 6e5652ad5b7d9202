"""Energy of a query, where the machine tells: Intel's and AMD's RAPL counters, Jetson's INA3221.

Both see the whole package or board, other processes included.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

__all__ = ["EnergyMeter", "find_meter"]

_INTERVAL = 0.02
"""Seconds between readings of a power sensor; an INA3221 itself averages over some milliseconds."""


class EnergyMeter(ABC):
    """Reads joules between :meth:`start` and :meth:`stop`; use it again as often as wanted."""

    source: str

    @abstractmethod
    def start(self) -> None:
        """Begin."""

    @abstractmethod
    def stop(self) -> float:
        """Return joules since the start."""

    def close(self) -> None:
        """Let go of whatever is held; harmless if repeated."""
        return


def find_meter(root: Path = Path("/")) -> EnergyMeter | None:
    """Return a meter for this machine, or None where none can be read.

    Parameters
    ----------
    root : where ``sys`` is mounted; for tests.
    """
    domains = []
    for folder in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        if folder.name.count(":") == 1:  # a package; its parts (core, dram) are counted in it
            limit, now = _number(folder / "max_energy_range_uj"), _number(folder / "energy_uj")
            if limit is not None and now is not None:
                domains.append(_Domain(folder / "energy_uj", limit))
    if domains:
        return _Rapl(domains)
    rails = []
    for monitor in sorted((root / "sys/bus/i2c/drivers/ina3221").glob("*/hwmon/hwmon*")):
        for label in sorted(monitor.glob("in*_label")):
            if (
                _text(label) or ""
            ).upper() == "VDD_IN":  # the board's supply; the rest is behind it
                number = label.name.removeprefix("in").removesuffix("_label")
                rail = _Rail(monitor / f"in{number}_input", monitor / f"curr{number}_input")
                if rail.watts() is not None:
                    rails.append(rail)
    return _Ina(rails) if rails else None


@dataclass(frozen=True)
class _Domain:
    counter: Path
    limit: int


class _Rapl(EnergyMeter):
    def __init__(self, domains: list[_Domain]) -> None:
        self.source = f"RAPL, {len(domains)} package{'' if len(domains) == 1 else 's'}"
        self._domains = domains
        self._begin: list[int] = []

    def start(self) -> None:
        self._begin = [_counter(domain) for domain in self._domains]

    def stop(self) -> float:
        joules = 0.0
        for domain, begin in zip(self._domains, self._begin, strict=True):
            spent = _counter(domain) - begin
            joules += (spent if spent >= 0 else spent + domain.limit) / 1e6  # it wrapped around
        return joules


@dataclass(frozen=True)
class _Rail:
    millivolts: Path
    milliamperes: Path

    def watts(self) -> float | None:
        volts, amperes = _number(self.millivolts), _number(self.milliamperes)
        return None if volts is None or amperes is None else volts * amperes / 1e6


class _Ina(EnergyMeter):
    """Reads power in the background and integrates it over the time between start and stop."""

    def __init__(self, rails: list[_Rail]) -> None:
        self.source = "INA3221, VDD_IN"
        self._rails = rails
        self._joules = 0.0
        self._last = monotonic()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="energy", daemon=True)
        self._thread.start()

    def start(self) -> None:
        with self._lock:
            self._joules, self._last = 0.0, monotonic()

    def stop(self) -> float:
        with self._lock:
            self._integrate()
            return self._joules

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_INTERVAL):
            with self._lock:
                self._integrate()

    def _integrate(self) -> None:
        watts = sum(rail.watts() or 0.0 for rail in self._rails)
        now = monotonic()
        self._joules += watts * (now - self._last)
        self._last = now


def _counter(domain: _Domain) -> int:
    return int(domain.counter.read_text(encoding="ascii"))


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # absent, or readable by root only (RAPL since 2020): there is no meter then
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.lstrip("-").isdecimal() else None
