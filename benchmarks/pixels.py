"""What the native pixel kernels are worth beside OpenCV with numpy, and PyTorch, on one core.

All ways do the same in turns, each time on memory that was pushed out of the caches, as a network
does between two queries. Their results are compared before anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, ClassVar

import cv2
import numpy as np
import typer
from numpy.typing import NDArray

from recallseg.benchmarks.facts import head
from recallseg.benchmarks.machine import Watch, describe_conditions
from recallseg.benchmarks.schema import Distribution, Head
from recallseg.benchmarks.statistics import paired_ratio
from recallseg.commands.common import check_output_folder
from recallseg.engines.bundle import Normalisation
from recallseg.engines.errors import EngineUnavailableError, RecallSegError
from recallseg.engines.pixels import Pixels, native_kernels
from recallseg.engines.pixels.native import NativePixels
from recallseg.engines.pixels.opencv import OpenCvPixels

__all__ = ["Measured", "PixelsReport", "measure_pixels", "pixels"]

IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EVICTING_BYTES = 64 << 20
"""Read and written between two calls: more than the last level of caches of most processors."""
LEAST_ROUNDS = 20
TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "uint8": 0.0, "bool": 0.0}
"""Between the ways of doing the same, on numbers up to about 3: PyTorch interpolates in another
order and with rounded fractions, fp16 rounds to 11 bits."""
FEW = 1e-4
"""Share of results that may differ by more: pixels of a mask where a logit is as good as 0."""

Work = Callable[[], Sequence[NDArray[Any]]]


@dataclass(frozen=True)
class Measured:
    """One way of doing one thing.

    Attributes
    ----------
    work : what is done; ``way`` : native, opencv, torch, or copy (of as many bytes).
    size : bytes read and written at least.
    time : milliseconds.
    gigabytes_per_second : ``size`` by the median.
    speedup, low, high : of the native kernels over this way, with the 95 % interval.
    """

    work: str
    way: str
    size: int
    time: Distribution
    gigabytes_per_second: float
    speedup: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class PixelsReport(Head):
    """``bench pixels``.

    Attributes
    ----------
    level : which instructions the native kernels took.
    threads : of every way.
    rounds : calls of every way.
    evicted_bytes : read and written between two calls.
    """

    schema: ClassVar[str] = "recallseg-bench-pixels/1"

    level: str
    threads: int
    rounds: int
    evicted_bytes: int
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class _Case:
    name: str
    size: int
    ways: dict[str, Work]


def measure_pixels(
    kernels: Any, rounds: int, step: Callable[[str], None] = lambda name: None
) -> list[Measured]:
    """Measure every case; raises RecallSegError if two ways disagree."""
    cv2.setNumThreads(1)
    found: list[Measured] = []
    for case in _cases(NativePixels(kernels)):
        step(case.name)
        found += _measure(case, rounds)
    return found


def _measure(case: _Case, rounds: int) -> Iterator[Measured]:
    results = {way: [array.copy() for array in work()] for way, work in case.ways.items()}
    for way, arrays in results.items():
        for ours, theirs in zip(results["native"], arrays, strict=True):
            difference = np.abs(ours.astype(np.float32) - theirs)
            if np.mean(difference > TOLERANCES[ours.dtype.name]) > FEW:
                raise RecallSegError(f"{case.name}: native and {way} gave different results.")
    half = np.ones(case.size // 2, np.uint8)
    other = np.zeros_like(half)

    def copy() -> Sequence[NDArray[Any]]:
        np.copyto(other, half)
        return [other]

    ways = {**case.ways, "copy": copy}
    evicting = np.zeros(EVICTING_BYTES, np.uint8)
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in list(ways)[:: 1 if number % 2 else -1]:
            evicting[::64] += 1
            start = perf_counter()
            ways[way]()
            spent[way].append((perf_counter() - start) * 1e3)
    for way, samples in spent.items():
        time = Distribution.of(samples)
        ratio = paired_ratio(samples, spent["native"])
        speed = case.size / time.p50 / 1e6
        yield Measured(
            case.name, way, case.size, time, round(speed, 2), round(ratio.ratio, 2),
            round(ratio.low, 2), round(ratio.high, 2),
        )  # fmt: skip


def _cases(native: NativePixels) -> Iterator[_Case]:
    rng = np.random.default_rng(0)
    ways: dict[str, Pixels] = {"native": native, "opencv": OpenCvPixels()}
    y, x = np.mgrid[:256, :256]
    grey = (2000 + 1500 * np.sin(x / 20) * np.cos(y / 15) + rng.normal(0, 90, x.shape)).astype("u2")
    colour = cv2.resize(cv2.merge([(grey >> 4).astype("u1")] * 3), (512, 512))

    def image_to_input(
        image: NDArray[Any], side: int, dtype: type, fixed: tuple[float, float] | None = None
    ) -> dict[str, Work]:
        def by(pixels: Pixels) -> Work:
            out: NDArray[Any] = np.zeros((1, 3, side, side), dtype)

            def work() -> Sequence[NDArray[Any]]:
                window = fixed or pixels.percentiles(image, 1.0, 99.0)
                pixels.prepare(image, window, [(out, IMAGENET)])
                return [out]

            return work

        return {name: by(pixels) for name, pixels in ways.items()}

    def logits_to_masks(logits: NDArray[np.float32], side: int) -> dict[str, Work]:
        def by(pixels: Pixels) -> Work:
            labels = np.zeros((side, side), np.uint8)
            masks = np.zeros((len(logits), side, side), np.bool_)

            def work() -> Sequence[NDArray[Any]]:
                pixels.finish(logits, [True] * len(logits), labels, masks)
                return [labels, masks]

            return work

        return {name: by(pixels) for name, pixels in ways.items()}

    def gather(bank: NDArray[Any], scales: NDArray[np.float32] | None = None) -> dict[str, Work]:
        def by(pixels: Pixels) -> Work:
            out = np.zeros(bank.shape, np.float32)

            def work() -> Sequence[NDArray[Any]]:
                pixels.gather(list(bank), out, None if scales is None else list(scales))
                return [out]

            return work

        return {name: by(pixels) for name, pixels in ways.items()}

    logits = rng.normal(size=(8, 256, 256)).astype("f4")
    logits = np.stack([8 * cv2.GaussianBlur(plane, (0, 0), 6) for plane in logits])
    bank = rng.normal(size=(16, 4096, 64)).astype(np.float16)
    torch = _torch_ways(grey, logits, bank)
    planes = 3 * 1024 * 1024
    yield _Case(
        "uint16 256x256 to 3x1024x1024 fp32", grey.nbytes + 4 * planes,
        {**image_to_input(grey, 1024, np.float32), **torch.get("image", {})},
    )  # fmt: skip
    yield _Case(
        "the same with a fixed window", grey.nbytes + 4 * planes,
        image_to_input(grey, 1024, np.float32, (500.0, 3500.0)),
    )  # fmt: skip
    yield _Case(
        "uint16 256x256 to 3x1024x1024 fp16", grey.nbytes + 2 * planes,
        image_to_input(grey, 1024, np.float16),
    )  # fmt: skip
    yield _Case(
        "uint8 512x512x3 to 3x224x224 fp32", colour.nbytes + 4 * 3 * 224 * 224,
        image_to_input(colour, 224, np.float32),
    )  # fmt: skip
    yield _Case(
        "logits 8x256x256 to masks and labels 512x512", logits.nbytes + 9 * 512 * 512,
        {**logits_to_masks(logits, 512), **torch.get("masks", {})},
    )  # fmt: skip
    yield _Case(
        "16 memories 4096x64 fp16 to fp32", 3 * bank.nbytes,
        {**gather(bank), **torch.get("memories", {})},
    )  # fmt: skip
    coarse = rng.integers(-127, 128, bank.shape, np.int8)
    scales = rng.uniform(0.01, 0.1, bank.shape[:2]).astype("f4")
    yield _Case(
        "16 memories 4096x64 int8 to fp32", 5 * coarse.nbytes + scales.nbytes,
        gather(coarse, scales),
    )  # fmt: skip


def _torch_ways(
    image: NDArray[np.uint16], logits: NDArray[np.float32], bank: NDArray[np.float16]
) -> dict[str, dict[str, Work]]:
    """Return what PyTorch has for each case; nothing where it is not installed."""
    try:
        import torch
        from torch.nn.functional import interpolate
    except ModuleNotFoundError:
        return {}
    torch.set_num_threads(1)
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET.mean, IMAGENET.std))
    ends = torch.tensor([0.01, 0.99])
    memories = torch.from_numpy(bank)
    network_input = torch.zeros(1, 3, 1024, 1024)
    gathered = torch.zeros(bank.shape)

    def prepare() -> Sequence[NDArray[Any]]:
        values = torch.from_numpy(image).to(torch.float32)
        low, high = torch.quantile(values.reshape(-1), ends)
        scaled = ((values - low) / (high - low)).clamp_(0, 1)
        resized = interpolate(scaled[None, None], (1024, 1024), mode="bilinear")
        torch.sub(resized, mean, out=network_input)
        network_input.div_(std)
        return [network_input.numpy()]

    def finish() -> Sequence[NDArray[Any]]:
        resized = interpolate(torch.from_numpy(logits)[None], (512, 512), mode="bilinear")[0]
        highest, best = resized.max(0)
        labels = torch.where(highest > 0, best + 1, 0).to(torch.uint8)
        return [labels.numpy(), (resized > 0).numpy()]

    def gather() -> Sequence[NDArray[Any]]:
        gathered.copy_(memories)
        return [gathered.numpy()]

    return {"image": {"torch": prepare}, "masks": {"torch": finish}, "memories": {"torch": gather}}


def pixels(
    output: Annotated[Path, typer.Option(help="Folder for pixels.json.")],
    rounds: Annotated[int, typer.Option(min=LEAST_ROUNDS, help="Calls of every way.")] = 200,
) -> None:
    """Measure the native pixel kernels beside OpenCV, PyTorch and a plain copy, on one core."""
    kernels = native_kernels()
    if kernels is None:
        raise EngineUnavailableError(
            "the native pixel kernels were not built, so there is nothing to compare. Install "
            "recallseg with '-C wheel.cmake=true' (docs/contribute/native-kernels.md)."
        )
    check_output_folder(output)
    conditions, watch = describe_conditions(), Watch()
    measured = measure_pixels(kernels, rounds, lambda name: typer.echo(name, err=True))
    conditions |= watch.stop()
    report = PixelsReport(
        **head(conditions),
        level=kernels.level(),
        threads=1,
        rounds=rounds,
        evicted_bytes=EVICTING_BYTES,
        measured=tuple(measured),
    )
    report.save(output / "pixels.json")
    for found in measured:
        typer.echo(
            f"{found.work:<46}{found.way:<8}p50 {found.time.p50:7.3f} ms  p95 "
            f"{found.time.p95:7.3f}  {found.gigabytes_per_second:6.2f} GB/s  native is "
            f"{found.speedup:.2f} times as fast ({found.low:.2f} to {found.high:.2f})"
        )
    for remark in report.remarks:
        typer.echo(f"note: {remark}", err=True)
