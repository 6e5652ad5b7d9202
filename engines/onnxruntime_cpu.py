"""ONNX Runtime on the CPU, with inputs and outputs bound to caller-owned memory.

A session may run in several threads at once, so that all engines of one graph in a process have
one: its weights, repacked for this processor, are there once. And all sessions take what they work
in from one arena: graphs run in turn, and each would keep its own
(docs/contribute/measurements.md).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from threading import get_native_id
from typing import Any, ClassVar
from weakref import WeakValueDictionary, finalize

from recallseg.engines.engine import Engine, EngineOptions, Tensor
from recallseg.engines.errors import EngineRunError, HostMemoryError
from recallseg.engines.imports import import_onnxruntime
from recallseg.engines.operators import (
    needs_operators,
    operators_digest,
    operators_library,
    require_operators,
)
from recallseg.engines.session_log import configure_session_log
from recallseg.engines.specs import GraphSpec

__all__ = ["OnnxRuntimeCpu"]

_PROVIDER = "CPUExecutionProvider"
_NO_MEMORY = re.compile(r"bad[_ ]alloc|failed to allocate|cannot allocate|out of memory", re.I)
"""How ONNX Runtime says that the machine has too little."""
SPIN_US = 50
"""For how long a thread without work keeps its core, in case the next operator comes: about what it
takes to wake it. ONNX Runtime (from 1.26 on) would else keep it through all that one thread does
alone, and take it from whoever reads, answers or runs beside (docs/contribute/measurements.md)."""
_SHARED: WeakValueDictionary[tuple[object, ...], Any] = WeakValueDictionary()
"""Sessions of this process, for as long as an engine has them."""


class OnnxRuntimeCpu(Engine):
    """A graph as an ONNX Runtime session on the CPU.

    Parameters
    ----------
    spec : the graph's tensors.
    path : the ``.onnx`` file.
    options : the thread count.

    Raises
    ------
    EngineUnavailableError
        If ONNX Runtime is not installed or cannot be loaded, or the graph needs native
        operators that were not built.
    EngineRunError
        If it refuses the graph, places it elsewhere, or the graph has other tensors than ``spec``.
    HostMemoryError
        If it has too little memory for the graph, then or whenever it runs.
    """

    name: ClassVar[str] = "onnxruntime-cpu"
    variants: ClassVar[tuple[str, ...]] = ("ort-cpu", "portable")

    def __init__(
        self, spec: GraphSpec, path: Path | None = None, options: EngineOptions | None = None
    ) -> None:
        super().__init__(spec, path, options)
        if path is None:
            raise EngineRunError(f"graph '{spec.name}': ONNX Runtime needs a .onnx file, got none.")
        onnxruntime = import_onnxruntime(wanted_by=f"engine '{self.name}'")
        threads = self.options.threads or usable_cores()
        key = _key(path, threads, onnxruntime.InferenceSession)
        session = _SHARED.get(key)
        if session is None:
            session = _SHARED[key] = _make_session(onnxruntime, path, threads)
            finalize(session, _forget_arena, onnxruntime).atexit = False
        self._session = session
        providers = self._session.get_providers()
        if providers != [_PROVIDER]:
            raise EngineRunError(
                f"ONNX Runtime placed {path.name} on {providers}, not on {_PROVIDER}."
            )
        self._check_tensors(path)
        self._binding = self._session.io_binding()

    def _check_tensors(self, path: Path) -> None:
        found = (
            {tensor.name for tensor in self._session.get_inputs()},
            {tensor.name for tensor in self._session.get_outputs()},
        )
        wanted = ({t.name for t in self.spec.inputs}, {t.name for t in self.spec.outputs})
        if found != wanted:
            raise EngineRunError(
                f"{path} has inputs and outputs {found}; graph '{self.spec.name}' needs {wanted}."
            )

    def _execute(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        binding = self._binding
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise _failed(
                f"ONNX Runtime failed in graph '{self.spec.name}': {error}", error
            ) from error

    def describe(self) -> dict[str, Any]:
        settings = self._session.get_session_options()
        return {
            "engine": self.name,
            "providers": self._session.get_providers(),
            "threads": settings.intra_op_num_threads,
        }


def _make_session(onnxruntime: Any, path: Path, threads: int) -> Any:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    configure_session_log(settings)
    # A query runs five sessions in turn: the threads of one must not spin through the next.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    settings.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    if not any(key[0] == os.getpid() for key in [*_SHARED]):
        _new_arena(onnxruntime)  # the first, or the first since a fork
    settings.add_session_config_entry("session.use_env_allocators", "1")
    # A plan of where each tensor lies would hold a second arena, of this graph alone.
    settings.enable_mem_pattern = False
    library = operators_library()
    try:
        if library is not None:
            settings.register_custom_ops_library(str(library))
        return onnxruntime.InferenceSession(str(path), sess_options=settings, providers=[_PROVIDER])
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        if library is None and path.is_file() and needs_operators(path):
            require_operators(str(path))
        raise _failed(f"ONNX Runtime cannot load {path}: {error}", error) from error


def _failed(what: str, error: Exception) -> EngineRunError:
    """Return what to raise: too little memory is no fault of a graph, nor of an image."""
    short = isinstance(error, MemoryError) or _NO_MEMORY.search(str(error))
    return HostMemoryError(what) if short else EngineRunError(what)


def _key(path: Path, threads: int, kind: object) -> tuple[object, ...]:
    """Return what a session is shared by: one process, one file as it is, one kind of session.

    Threads are a session's, and those who share one would wait for them: a number that is neither
    one (the caller's) nor all that there are is meant for this engine alone. Linux gives threads
    the cores and the urgency of the one that makes them, so that those are shared by who has both.
    """
    try:
        found = path.stat()
    except OSError:  # said by whoever opens it
        return (object(),)
    alone = object() if 1 < threads < usable_cores() else None
    file = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    made_by = _scheduling() if threads > 1 else None
    return os.getpid(), str(path), *file, threads, kind, operators_digest(), alone, made_by


def _scheduling() -> tuple[object, ...]:
    """Return on which cores, and how urgently, this thread runs and those that it makes will."""
    if not hasattr(os, "sched_getaffinity"):
        return ()
    me = get_native_id()
    return (
        frozenset(os.sched_getaffinity(me)),
        os.getpriority(os.PRIO_PROCESS, me),
        os.sched_getscheduler(me),
        os.sched_getparam(me).sched_priority,
    )


def _new_arena(onnxruntime: Any) -> None:
    """Make the arena of sessions to come; that of earlier ones goes with the last of them."""
    cpu = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    # Of any size, growing by doubling, the rest as ONNX Runtime has it.
    onnxruntime.create_and_register_allocator(cpu, onnxruntime.OrtArenaCfg(0, 0, -1, -1))


def _forget_arena(onnxruntime: Any) -> None:
    """Let the arena go with the last session."""
    if not [*_SHARED.values()]:
        _new_arena(onnxruntime)


def usable_cores() -> int:
    """Return how many cores this process may run on (its affinity, not the machine's total)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
