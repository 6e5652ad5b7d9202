"""How long each graph takes on the device itself, by events on its stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any

import numpy as np

from recallseg.benchmarks.schema import Distribution
from recallseg.benchmarks.subjects import RuntimeChoice
from recallseg.engines.buffer_shapes import buffer_shapes
from recallseg.engines.bundle import Bundle
from recallseg.engines.composition import Composition
from recallseg.engines.device import DeviceTensor, open_device
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import BundleError, EngineUnavailableError
from recallseg.engines.registry import load_engines
from recallseg.runtime.model.buffers import Buffers

__all__ = ["measure_graphs"]

WARM_UPS = 5
LEAST_ROUNDS = 10
GRAPHS = ("embed", "encode", "attend", "decode")
_ONCE = ("embed", "encode")  # they know neither k nor n


def measure_graphs(
    bundle: Bundle,
    choice: RuntimeChoice,
    ks: Sequence[int],
    ns: Sequence[int],
    *,
    rounds: int,
    seconds: float,
    step: Callable[[str], None],
) -> dict[str, Any]:
    """Return, for every graph, k and n, milliseconds on the device and to queue it.

    Each runs ``rounds`` times, or as often as ``seconds`` allow. Inputs are noise of the size that
    normalised images and memories have; kernels take the same time for any numbers that are no
    subnormals.

    Raises
    ------
    EngineUnavailableError
        If this machine has no such engine, or the bundle no such graphs.
    """
    device = open_device()
    options = EngineOptions(device=device, cuda_graphs=choice.cuda_graphs)
    before = device.free_memory()
    start = perf_counter()
    try:
        engines = load_engines(bundle, choice.engine, choice.precision, options=options)
    except BundleError as error:
        raise EngineUnavailableError(str(error)) from error
    loaded = perf_counter() - start
    composition = Composition(engines)
    buffers = Buffers(bundle, device.tensor)
    shapes = buffer_shapes(bundle.specs, bundle.geometry, n=max(ns), k=max(ks), masks=max(ns))
    buffers.grow(shapes)
    _fill({name: buffers[name] for name in shapes}, device.stream)
    first, last = device.new_event(), device.new_event()
    runs = []
    for n in ns:
        for k in ks:
            for graph in GRAPHS:
                if graph in _ONCE and (k, n) != (ks[0], ns[0]):
                    continue
                step(f"{graph}, k = {k}, n = {n}")
                tensors = buffers.of(graph, n, k)
                spent: list[float] = []
                queued: list[float] = []
                allocations = device.allocations
                until = perf_counter() + seconds
                for number in range(WARM_UPS + rounds):
                    if perf_counter() > until and len(spent) >= LEAST_ROUNDS:
                        break
                    first.record(device.stream)
                    start = perf_counter()
                    composition.run(graph, tensors)
                    queuing = (perf_counter() - start) * 1e3
                    last.record(device.stream)
                    last.synchronize()
                    if number < WARM_UPS:
                        allocations = device.allocations
                    else:
                        spent.append(last.since(first))
                        queued.append(queuing)
                runs.append(
                    {
                        "graph": graph,
                        "k": None if graph in _ONCE else k,
                        "n": None if graph in _ONCE else n,
                        "device_ms": asdict(Distribution.of(spent)),
                        "queue_ms": asdict(Distribution.of(queued)),
                        "allocations": device.allocations - allocations,
                    }
                )
    return {
        "bundle": bundle.name,
        "image_size": bundle.geometry.image_size,
        **choice.to_json(),
        "device": str(device.facts),
        "load_s": round(loaded, 3),
        "bytes_taken": before - device.free_memory(),
        "runs": runs,
    }


def _fill(tensors: dict[str, DeviceTensor], stream: Any) -> None:
    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        if name != "pointer_time":
            stream.copy_in(tensor, rng.normal(size=tensor.shape).astype(np.float32))
    stream.synchronize()
