"""Things that are made once: by one of several workers for all, or for every later run too."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

__all__ = ["build_folder", "exported_once", "once"]

SOURCE = Path(__file__).parents[2]


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Let ``make`` fill ``folder`` unless that was done; who comes meanwhile waits for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = folder.with_name(f"{folder.name}.made")
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


def build_folder(
    config: pytest.Config, name: str, sources: Sequence[Path | str], tools: str | None = None
) -> Path:
    """Return where a build of these files (folders: all in them) lies, for :func:`once`.

    Another content, Python or compiler (or what ``tools`` says instead) has another folder, so
    what is there was built from these.
    """
    digest = hashlib.sha256(f"{sys.executable}\n{sys.version}\n{tools or _compilers()}".encode())
    for source in sources:
        path = SOURCE / source
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(SOURCE)}\0".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return config.cache.mkdir("builds") / f"{name}-{digest.hexdigest()[:16]}"


def exported_once(
    config: pytest.Config, name: str, make: Callable[[Path], object], *sources: Path | str
) -> Path:
    """Let ``make`` export into a folder, once for this exporter and what else it is made from."""
    names = ("numpy", "onnx", "onnxruntime", "onnxscript", "torch", "transformers")
    tools = "\n".join(f"{name} {version(name)}" for name in names)
    return once(build_folder(config, name, ("engines", "export", *sources), tools), make)


@cache
def _compilers() -> str:
    said = [f"nanobind {version('nanobind')}" if find_spec("nanobind") else ""]
    for tool in ("cmake", "cc", "c++", "nvcc"):
        if where := shutil.which(tool):
            command = [where, "--version"]
            said += [where, subprocess.run(command, capture_output=True, text=True).stdout]
    return "\n".join(said)
