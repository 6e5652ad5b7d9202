"""Engines by name: the one place that knows which backends exist and what each needs."""

from __future__ import annotations

import importlib
from numbers import Integral
from typing import TYPE_CHECKING, Any

from recallseg.engines import defaults
from recallseg.engines.engine import Engine, EngineOptions
from recallseg.engines.errors import InputError
from recallseg.engines.precisions import find_precision
from recallseg.engines.specs import GRAPHS

if TYPE_CHECKING:
    from recallseg.engines.bundle import Bundle

__all__ = ["ENGINES", "check_choice", "engine_class", "load_engines"]

ENGINES: dict[str, tuple[str, str]] = {
    "onnxruntime-cpu": ("recallseg.engines.onnxruntime_cpu", "OnnxRuntimeCpu"),
    "onnxruntime-cuda": ("recallseg.engines.onnxruntime_cuda", "OnnxRuntimeCuda"),
    "onnxruntime-tensorrt": ("recallseg.engines.onnxruntime_tensorrt", "OnnxRuntimeTensorRt"),
    "tensorrt": ("recallseg.engines.tensorrt.engine", "TensorRt"),
    "tensorrt-rtx": ("recallseg.engines.tensorrt.engine", "TensorRtRtx"),
    "fake": ("recallseg.engines.fake", "FakeEngine"),
}
"""Module and class of every engine that this version can run."""

MOST_THREADS = 4096
"""On a CPU: each graph makes as many, whatever cores there are. The C interface has it too."""


def engine_class(name: str) -> type[Engine]:
    """Return the class behind an engine's public name.

    Raises
    ------
    InputError
        If there is no such name.
    """
    if name in ENGINES:
        module, attribute = ENGINES[name]
        found: type[Engine] = getattr(importlib.import_module(module), attribute)
        return found
    raise InputError(f"there is no engine '{name}'. Engines here: {', '.join(ENGINES)}.")


def check_choice(name: str, precision: str, threads: int | None) -> type[Engine]:
    """Return the class behind an engine's name; InputError if it cannot be asked for like this."""
    find_precision(precision)
    given: Any = threads
    whole = isinstance(given, Integral) and not isinstance(given, bool)
    if given is not None and not (whole and 1 <= given <= MOST_THREADS):
        kind = "" if whole else f" ({type(given).__name__})"
        raise InputError(
            f"threads must be a whole number from 1 to {MOST_THREADS}, got {given!r}{kind}."
        )
    return engine_class(name)


def load_engines(
    bundle: Bundle,
    name: str,
    precision: str = defaults.PRECISION,
    *,
    options: EngineOptions | None = None,
    graphs: tuple[str, ...] = GRAPHS,
    variants: tuple[str, ...] | None = None,
) -> dict[str, Engine]:
    """Make a bundle's graphs ready to run.

    Parameters
    ----------
    bundle : whose graphs to load; each file is compared with its digest.
    name, precision : as in docs/contribute/interfaces.md.
    options : thread count and the like.
    graphs : which are wanted; an optional one only where the bundle has it.
    variants : graph variants to take instead of those that the engine likes best.

    Raises
    ------
    InputError, EngineUnavailableError, EngineRunError, BundleError
    PlanError, VerificationError
        From engines that run compiled plans: damaged, or not proven on this device.
    """
    options = options or EngineOptions()
    kind = check_choice(name, precision, options.threads)
    return kind.load_all(bundle, precision, options, graphs, variants)
