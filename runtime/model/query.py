"""What a query does with pixels and tensors, on the CPU or on a GPU, behind one interface."""

from __future__ import annotations

from collections.abc import Sequence

from recallseg.engines.device_engine import DeviceEngine
from recallseg.engines.errors import InputError
from recallseg.engines.registry import engine_class
from recallseg.runtime.library import Library
from recallseg.runtime.model.interface import GpuOptions, Query, Wanted

__all__ = ["GpuOptions", "Query", "Wanted", "open_query"]


def open_query(
    library: Library,
    structures: Sequence[str],
    *,
    k: int,
    engine: str,
    precision: str,
    graphs: tuple[str, ...],
    threads: int | None = None,
    gpu: GpuOptions | None = None,
) -> Query:
    """Load engines and allocate everything for queries of up to these structures and k memories.

    Raises
    ------
    InputError
        If ``gpu`` is given and the engine runs on the CPU.
    DeviceMemoryError
        If the GPU has too little free memory, with the figure; nothing is allocated then.
    EngineUnavailableError, EngineRunError, BundleError, PlanError, VerificationError
        As :func:`recallseg.engines.registry.load_engines`.
    """
    kind = engine_class(engine)
    if issubclass(kind, DeviceEngine):
        kind.require_library()  # before anything else that such a machine may lack as well
        from recallseg.runtime.model.device import DeviceQuery

        return DeviceQuery(library, structures, k, engine, precision, graphs, gpu or GpuOptions())
    if gpu is not None:
        raise InputError(f"engine '{engine}' runs on the CPU: leave gpu out, or choose another.")
    from recallseg.runtime.model.host import HostQuery

    return HostQuery(library, structures, k, engine, precision, graphs, threads)
