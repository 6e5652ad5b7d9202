"""``bench.json``: what a benchmark leaves, as data. CPU and GPU runs share this schema.

Times are milliseconds unless a name ends in ``_s``; sizes are bytes; what was not or cannot be
measured is null, never 0. ``version`` grows with every change that a reader could stumble over;
fields that a reader does not know are an error, so that a figure is never dropped in silence.

::

    Report                    one file: one command on one machine
    ├── created, machine, conditions, versions: Head    when and where
    ├── settings              how
    ├── bundle: BundleFacts                        which weights, of which source
    ├── runs: Run ...         one way of answering queries, at one k and n (bench latency)
    │   ├── stages: Distribution   by stage name, and "total"
    │   └── memory, cold_start, energy, quality
    ├── ratios: Ratio ...     baseline / runtime, both measured in turns
    ├── retrieval: RetrievalRun ...    one library size (bench retrieval)
    ├── soak: SoakRun ...              (bench soak)
    └── together: TogetherRun ...      (bench soak --minutes)

Stage names are those of :class:`recallseg.runtime.segmenting.result.Result`: prepare, embed,
search, encode, gather, attend, decode, finish; baselines that encode exemplars anew add
``memorize``. ``total`` is measured around the whole query by the harness, for everything alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from recallseg.benchmarks.codec import decode, encode
from recallseg.benchmarks.statistics import percentile
from recallseg.engines.errors import InputError

__all__ = [
    "FORMAT",
    "VERSION",
    "BundleFacts",
    "ColdStart",
    "DeviceUse",
    "Distribution",
    "Energy",
    "Head",
    "Memory",
    "Quality",
    "Ratio",
    "Report",
    "RetrievalRun",
    "Run",
    "SoakPoint",
    "SoakRun",
]

FORMAT = "recallseg-bench"
VERSION = 3
_DIGITS = 4  # of a millisecond: below what any clock here resolves


@dataclass(frozen=True)
class Distribution:
    """Durations of one stage in milliseconds.

    ``samples`` are in the order in which they were taken; the rest is computed from them.
    """

    p50: float
    p90: float
    p95: float
    p99: float
    mean: float
    least: float
    most: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Distribution:
        """Summarise durations; raises InputError if there are none."""
        p50, p90, p95, p99 = (round(percentile(samples, q), _DIGITS) for q in (50, 90, 95, 99))
        return cls(
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            mean=round(sum(samples) / len(samples), _DIGITS),
            least=round(min(samples), _DIGITS),
            most=round(max(samples), _DIGITS),
            samples=tuple(round(sample, _DIGITS) for sample in samples),
        )


@dataclass(frozen=True)
class Memory:
    """Bytes, measured in a process of its own that does nothing else.

    Attributes
    ----------
    resident_peak : largest resident set from start to last query, engines and libraries included.
    resident_growth : of the resident set from the second query to the last.
    workspace : buffers that a query touches, as the runtime states them.
    device_peak : memory taken on the device.
    device_allocations : allocations on the device during the queries; 0 is what a runtime wants.
    """

    resident_peak: int | None = None
    resident_growth: int | None = None
    workspace: int | None = None
    device_peak: int | None = None
    device_allocations: int | None = None


@dataclass(frozen=True)
class ColdStart:
    """Seconds from the start of a new process, files being in the page cache.

    ``imported`` (interpreter and packages), ``ready`` (library open, engines loaded),
    ``first_result`` (the first query answered); each includes the ones before.
    """

    imported_s: float
    ready_s: float
    first_result_s: float


@dataclass(frozen=True)
class DeviceUse:
    """Memory of the GPU, in bytes, after the last query.

    ``held`` was taken through RecallSeg's own buffers, ``in_use`` by all processes (engines,
    driver and others included). ``allocations`` counts RecallSeg's in queries after the warm-up,
    ``growth`` is what was taken of the GPU during these, engines having allocators of their own.
    Steady state has none.
    """

    held: int
    in_use: int
    allocations: int
    growth: int | None = None


@dataclass(frozen=True)
class Energy:
    """Joules per query (median) and the sensor that was read. The sensor sees all processes."""

    joules: float
    source: str


@dataclass(frozen=True)
class Quality:
    """What speed is worth.

    Attributes
    ----------
    parity_error : largest relative error against PyTorch in the bundle's manifest.
    golden_error : largest relative error against the bundle's golden tensors, measured in this run.
    golden_dice : least Dice of the golden masks, measured in this run.
    logit_difference : relative difference (2-norm) of this run's logits to the first runtime's, for
        the same query and exemplars.
    dice : mean Dice on real or held-out images, as given by the caller.
    """

    parity_error: float | None = None
    golden_error: float | None = None
    golden_dice: float | None = None
    logit_difference: float | None = None
    dice: float | None = None


@dataclass(frozen=True)
class Run:
    """One way of answering queries, at one k and n.

    Attributes
    ----------
    subject : its name, e.g. ``onnxruntime-cpu fp32`` or ``torch-cached``.
    role : ``runtime`` or ``baseline``.
    engine, precision, variant : what ran; variant is null for baselines.
    device : e.g. ``cpu``, ``NVIDIA H100``.
    cuda_graph : whether queries were replayed as a CUDA graph; null on a CPU.
    threads : CPU threads.
    k, n : recalled exemplars and structures; ``image_size`` S in pixels.
    rounds : numbers of the rounds in which it ran; equal numbers were measured side by side.
    throughput : queries per second, one at a time.
    remarks : what a reader must know, e.g. graphs that could not be compiled.
    """

    subject: str
    role: str
    engine: str
    precision: str
    variant: str | None
    device: str
    cuda_graph: bool | None
    threads: int | None
    k: int
    n: int
    image_size: int
    rounds: tuple[int, ...]
    stages: Mapping[str, Distribution]
    throughput: float
    memory: Memory | None = None
    cold_start: ColdStart | None = None
    device_use: DeviceUse | None = None
    energy: Energy | None = None
    quality: Quality = field(default_factory=Quality)
    remarks: tuple[str, ...] = ()

    @property
    def total(self) -> Distribution:
        """Durations of whole queries."""
        return self.stages["total"]


@dataclass(frozen=True)
class Ratio:
    """How many times as long ``baseline`` takes as ``subject`` in one stage: above 1, subject wins.

    Ratio of medians over the rounds that both ran in, with its 95 % bootstrap interval.
    """

    subject: str
    baseline: str
    k: int
    n: int
    stage: str
    ratio: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class RetrievalRun:
    """Search in a library of one size.

    Attributes
    ----------
    size, dimension : embeddings and their length; ``k`` neighbours asked for.
    method : ``exact``, or ``graph`` above the runtime's threshold.
    recall : share of the true k nearest that were found, mean over the queries.
    search : ``Library.search``, what a query pays.
    index : the part of it that the index module takes, without keys and places.
    index_bytes, catalog_bytes : on disk.
    fill_s : writing the catalog (in bulk, not as ``Library.add`` does it); ``build_s`` the index.
    open_s : opening the library up to the first result, files in the page cache; median.
    open_cold_s : the same after asking the system to drop these files from its cache.
    """

    size: int
    dimension: int
    k: int
    method: str
    queries: int
    recall: float
    search: Distribution
    index: Distribution
    index_bytes: int
    catalog_bytes: int
    fill_s: float
    build_s: float
    open_s: float
    open_cold_s: float | None


@dataclass(frozen=True)
class SoakPoint:
    """Bytes that the process held after a number of queries."""

    query: int
    memory: int


@dataclass(frozen=True)
class SoakRun:
    """Many queries in one process.

    Attributes
    ----------
    warm_up : queries before anything counts.
    memory_start, memory_end : bytes held after the warm-up and at the end, pages of files left out.
    growth : (end - start) / start.
    slowest_over_median : of the queries after the warm-up.
    """

    subject: str
    engine: str
    precision: str
    device: str
    threads: int | None
    k: int
    n: int
    image_size: int
    queries: int
    warm_up: int
    memory_start: int
    memory_end: int
    growth: float
    slowest_over_median: float
    total: Distribution
    series: tuple[SoakPoint, ...]


@dataclass(frozen=True)
class SoakSeries:
    """One figure over a run of services together, and whether it stayed as it was.

    Attributes
    ----------
    seconds, values : readings, in the order in which they were taken.
    early, late : of the second quarter of the run and of the last: the mean of a reading of the
        process, the median of durations.
    most : that ``late`` may be; None where it may be anything.
    """

    name: str
    unit: str
    early: float
    late: float
    most: float | None
    seconds: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def flat(self) -> bool:
        """Whether it stayed as it was."""
        return self.most is None or self.late <= self.most


@dataclass(frozen=True)
class TogetherRun:
    """Services, writers and readers in one process.

    Attributes
    ----------
    counts : what was done, and how often.
    errors : what failed; empty is what must be.
    process, latency : figures of the process, and milliseconds of what was done.
    """

    minutes: float
    counts: Mapping[str, int]
    errors: tuple[str, ...]
    process: tuple[SoakSeries, ...]
    latency: tuple[SoakSeries, ...]

    @property
    def grew(self) -> tuple[str, ...]:
        """Names of what did not stay as it was, of the process."""
        return tuple(one.name for one in self.process if not one.flat)


@dataclass(frozen=True)
class BundleFacts:
    """Which bundle; ``source`` is the less trustworthy one of its two networks' weights."""

    name: str
    identity: str
    sam2: str
    dinov2: str
    source: str
    notice: str
    image_size: int
    embed_size: int


@dataclass(frozen=True, kw_only=True)
class Head:
    """When and where: what every benchmark tells first.

    Attributes
    ----------
    created : end of the run, ISO 8601, UTC.
    machine : processor, cores, memory (as in every report of RecallSeg).
    conditions : affinity, governor, vector units, load, and what else ran meanwhile.
    versions : of packages.
    remarks : what a reader must know before using a figure.
    """

    schema: ClassVar[str]

    created: str
    machine: Mapping[str, Any]
    conditions: Mapping[str, Any]
    versions: Mapping[str, str]
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"schema": self.schema, **encode(self)}

    def save(self, path: Path) -> None:
        """Write the file; its folder is made if need be."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Report(Head):
    """One benchmark: one command on one machine.

    Attributes
    ----------
    kind : ``latency``, ``retrieval`` or ``soak``.
    settings : the options, and how images or embeddings were made.
    """

    kind: str
    settings: Mapping[str, Any]
    bundle: BundleFacts | None = None
    runs: tuple[Run, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    retrieval: tuple[RetrievalRun, ...] = ()
    soak: tuple[SoakRun, ...] = ()
    together: tuple[TogetherRun, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"format": FORMAT, "version": VERSION, **encode(self)}

    @classmethod
    def from_json(cls, data: Any) -> Report:
        """Rebuild from JSON values; raises InputError for anything else than this version's."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError(
                "this is no benchmark of RecallSeg: expected the contents of a bench.json."
            )
        if data.get("version") != VERSION:
            raise InputError(
                f"the benchmark has format version {data.get('version')!r}; this RecallSeg reads "
                f"version {VERSION}. Measure again, or use the RecallSeg that wrote it."
            )
        return decode(cls, {k: v for k, v in data.items() if k not in ("format", "version")})

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a ``bench.json``, or the one in a folder.

        Raises
        ------
        InputError
            If there is none, or it cannot be read.
        """
        file = path / "bench.json" if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"there is no benchmark at {file}; make one with 'recallseg bench'.")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read: {error}.") from error
        return cls.from_json(data)
