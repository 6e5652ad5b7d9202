"""Packages that are there only if their extra was installed, and the one door to ONNX Runtime.

From 1.29 on, ONNX Runtime on Linux reports to its maker: as soon as it is imported it writes
``~/.cache/Microsoft/DeveloperTools/.onnxruntime/{deviceid,onnxruntime.db}`` (executable, names of
graphs, timings, texts of errors), and some seconds later it looks for the collector's address. It
reads ``ORT_DISABLE_TELEMETRY`` once, while it is loaded; ``disable_telemetry_events()`` comes after
the files and the socket. So the variable is set when ``recallseg`` is imported, before anything of
it can import ONNX Runtime, and every import of it goes through :func:`import_onnxruntime`.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import Any

from recallseg.engines.errors import EngineUnavailableError

__all__ = ["disable_telemetry", "import_needed", "import_onnxruntime", "import_ray", "lacks_memory"]

VARIABLE = "ORT_DISABLE_TELEMETRY"
_OFF = ("1", "true")
_NO_MEMORY = ("annot allocate memory", "failed to map segment", "out of memory")

_too_late = False
"""Whether ONNX Runtime was there, with its telemetry on, before RecallSeg."""


def disable_telemetry() -> None:
    """Set ``ORT_DISABLE_TELEMETRY`` for this process and those that it starts."""
    global _too_late
    if os.environ.get(VARIABLE, "").lower() not in _OFF:
        _too_late = _too_late or sys.modules.get("onnxruntime") is not None
        os.environ[VARIABLE] = "1"


def import_onnxruntime(part: str = "", *, wanted_by: str, extra: str = "cpu") -> Any:
    """Return ONNX Runtime, its telemetry off, or a module of it such as ``quantization``.

    Warns once (RuntimeWarning) if somebody else had imported it before with its telemetry on.

    Parameters
    ----------
    part : below ``onnxruntime``; empty for the package itself.
    wanted_by : for the message, as in "engine 'onnxruntime-cpu'".
    extra : of RecallSeg, that installs it.

    Raises
    ------
    EngineUnavailableError, MemoryError
        As :func:`import_needed`.
    """
    global _too_late
    disable_telemetry()
    if _too_late:
        _too_late = False
        warnings.warn(
            "onnxruntime was imported before recallseg, with its telemetry on: since version 1.29 "
            "it then writes below ~/.cache/Microsoft and reports to its maker. Import recallseg "
            f"first, or start the process with {VARIABLE}=1.",
            RuntimeWarning,
            stacklevel=3,
        )
    package = "onnxruntime-gpu" if extra == "gpu" else "onnxruntime"
    return import_needed(
        f"onnxruntime.{part}" if part else "onnxruntime",
        wanted_by,
        f"pip install 'recallseg[{extra}]'",
        package,
    )


def import_ray() -> Any:
    """Return Ray, its usage statistics off: for this process, and for a cluster that it starts.

    Raises
    ------
    EngineUnavailableError, MemoryError
        As :func:`import_needed`.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when a cluster starts
    return import_needed("ray", "an archive on Ray", "pip install 'recallseg[ray]'")


def import_needed(module: str, wanted_by: str, install: str, package: str | None = None) -> Any:
    """Import a module of a package that need not be there.

    Parameters
    ----------
    module : its full name.
    wanted_by : for the message, as in "engine 'onnxruntime-cpu'".
    install : how to get it, without a full stop.
    package : the distribution's name, where it is not that of the top module.

    Raises
    ------
    EngineUnavailableError
        If it is not installed, or is and cannot be loaded; the message says which.
    MemoryError
        If there was too little memory to load it.
    """
    top = module.partition(".")[0]
    package = package or top
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        if lacks_memory(error):
            raise MemoryError(f"too little memory to load {package}: {error}") from error
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise EngineUnavailableError(
                f"{wanted_by} needs the package {package}, which is not installed: {install}."
            ) from error
        raise EngineUnavailableError(
            f"{wanted_by} needs the package {package}, which is installed and cannot be loaded: "
            f"{error}. Install it anew, with all that it needs: {install}."
        ) from error


def lacks_memory(error: BaseException) -> bool:
    """Whether this is lack of memory.

    Also where the dynamic loader's word for it came as ImportError, or PyTorch's as RuntimeError.
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, (ImportError, OSError, RuntimeError))
        and any(s in str(error) for s in _NO_MEMORY)
    )
