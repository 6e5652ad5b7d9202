"""What is measured: anything that turns an image into masks and says where the time went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.schema import DeviceUse
from recallseg.engines.bundle import Bundle
from recallseg.engines.registry import engine_class
from recallseg.engines.specs import GRAPHS
from recallseg.runtime.library import Library
from recallseg.runtime.model.model import GpuOptions
from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["RuntimeChoice", "RuntimeSubject", "Subject", "open_segmenter", "portable_only"]


class Subject(Protocol):
    """One way of answering queries, at one k and for one set of structures."""

    name: str
    role: str
    warm_ups: int
    """Queries before the clock counts: the first may compile or fault pages in."""
    remarks: list[str]

    def run(self, image: NDArray[Any]) -> Mapping[str, float]:
        """Segment one image; return milliseconds by stage, without the total."""
        ...

    def take_stock(self, *, before: bool) -> None:
        """Note what it holds, before and after every query that counts; the clock stands still."""
        ...

    @property
    def logits(self) -> NDArray[np.float32]:
        """Logits nx(S/4)x(S/4) of the last query, a view."""
        ...


@dataclass(frozen=True)
class RuntimeChoice:
    """A configuration of the runtime.

    ``portable`` leaves out every graph variant but the reference one, to show what the engine's
    own variants bring. ``cuda_graphs`` records and replays what engines on a GPU queue.
    """

    engine: str
    precision: str
    threads: int | None = None
    portable: bool = False
    cuda_graphs: bool = False

    @property
    def name(self) -> str:
        """What reports call it."""
        more = f"{' graphs' if self.cuda_graphs else ''}{' portable' if self.portable else ''}"
        return f"{self.engine} {self.precision}{more}"

    @property
    def role(self) -> str:
        """``baseline`` for the reference variant, ``runtime`` otherwise."""
        return "baseline" if self.portable else "runtime"

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    def variant(self, bundle: Bundle) -> str:
        """Return the graph variant that is run; several are joined by ``+``."""
        shown = portable_only(bundle) if self.portable else bundle
        order = engine_class(self.engine).variants
        used = [shown.graph_file(graph, order, self.precision)[1] for graph in GRAPHS]
        return "+".join(dict.fromkeys(used))


class RuntimeSubject:
    """RecallSeg itself."""

    # With CUDA graphs the first query runs, the second records, the third replays.
    warm_ups = 3

    def __init__(self, choice: RuntimeChoice, segmenter: Segmenter) -> None:
        self.name = choice.name
        self.role = choice.role
        self.remarks: list[str] = []
        self.segmenter = segmenter
        self._allocations = self._growth = 0
        self._before = (0, 0)

    @property
    def device_use(self) -> DeviceUse | None:
        """What it has taken of the GPU; None on a CPU."""
        device = self.segmenter.device
        if device is None:
            return None
        return DeviceUse(
            held=device.live_bytes,
            in_use=device.facts.memory - device.free_memory(),
            allocations=self._allocations,
            growth=self._growth,
        )

    def run(self, image: NDArray[Any]) -> Mapping[str, float]:
        """Segment one image; see :class:`Subject`."""
        timings = self.segmenter.segment(image).timings
        return {stage: spent for stage, spent in timings.items() if stage != "total"}

    def take_stock(self, *, before: bool) -> None:
        """See :class:`Subject`: what others of this process take between its queries is theirs."""
        device = self.segmenter.device
        if device is None:
            return
        now = device.allocations, device.free_memory()
        if before:
            self._before = now
        else:
            self._allocations += now[0] - self._before[0]
            self._growth += self._before[1] - now[1]

    @property
    def logits(self) -> NDArray[np.float32]:
        """See :class:`Subject`."""
        return self.segmenter.logits()


def portable_only(bundle: Bundle) -> Bundle:
    """Return the same bundle as if it had the reference variant only; its identity is the same."""
    graphs = {
        key: entry
        for key, entry in bundle.manifest["graphs"].items()
        if key.startswith("portable/")
    }
    return Bundle(bundle.path, {**bundle.manifest, "graphs": graphs})


def open_segmenter(
    library: Path, bundle: Bundle, choice: RuntimeChoice, *, k: int, structures: Sequence[str]
) -> Segmenter:
    """Open a library for reading and make a segmenter for it."""
    shown = portable_only(bundle) if choice.portable else bundle
    return Segmenter(
        Library.open(library, shown),
        k=k,
        structures=structures,
        reach=math.inf,  # k is what is varied here
        engine=choice.engine,
        precision=choice.precision,
        threads=choice.threads,
        gpu=GpuOptions(cuda_graphs=True) if choice.cuda_graphs else None,
    )
