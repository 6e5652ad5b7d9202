"""The machine and the software that a result was made on: in every report, beside every timing."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["PACKAGES", "describe_machine", "package_versions"]

PACKAGES = (
    "recallseg",
    "numpy",
    "opencv-python-headless",
    "usearch",
    "onnxruntime",
    "onnxruntime-gpu",
    "scipy",
    "nibabel",
    "nilearn",
    "onnx",
    "torch",
    "transformers",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
)
"""Packages whose versions can change a result or a timing."""


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, memory (bytes), operating system and Python; None where unknown."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of installed packages among :data:`PACKAGES`, read without importing."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _processor() -> str:
    if sys.platform == "linux":
        for line in _lines(Path("/proc/cpuinfo")):
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model") and value.strip():
                return value.strip()
        model = _lines(Path("/proc/device-tree/model"))  # a Jetson has no model name in cpuinfo
        if model:
            return model[0].strip("\0 ")
    return platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
