"""What a call through librecallseg costs beside the Python call that it makes.

The library is loaded into this process (it then uses this interpreter), and both segment the same
image in turns with the engine ``fake``, whose networks cost almost nothing. What is reported is the
difference of each pair; it includes ctypes, which device software does not pay for.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any, ClassVar

import numpy as np
import typer

from recallseg.benchmarks.facts import head
from recallseg.benchmarks.machine import Watch, describe_conditions
from recallseg.benchmarks.schema import Distribution, Head
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError, RecallSegError
from recallseg.runtime.library import Library
from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["CLibrary", "Overhead", "OverheadReport", "capi", "measure_overhead"]

ABI_VERSION, UINT8, K = 1, 1, 4
LEAST_ROUNDS = 20


class _Image(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("dtype", c.c_int32),
        ("data", c.c_void_p),
        ("ndim", c.c_int32),
        ("reserved", c.c_int32),
        ("shape", c.c_int64 * 3),
        ("strides", c.c_int64 * 3),
        ("spacing", c.c_double * 2),
    )


class _Output(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("reserved", c.c_uint32),
        ("rows", c.c_int64),
        ("columns", c.c_int64),
        ("label_map", c.c_void_p),
        ("label_strides", c.c_int64 * 2),
        ("masks", c.c_void_p),
        ("mask_count", c.c_int64),
        ("mask_strides", c.c_int64 * 3),
    )


class _SegmenterOptions(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("k", c.c_int32),
        ("structures", c.c_void_p),
        ("structure_count", c.c_size_t),
        ("engine", c.c_char_p),
        ("precision", c.c_char_p),
        ("threads", c.c_int32),
        ("memories", c.c_int32),
        ("tags", c.c_void_p),
        ("tag_count", c.c_size_t),
        ("reach", c.c_double),
    )


class CLibrary:
    """``librecallseg.so`` in this process, with one open segmenter.

    Parameters
    ----------
    file : the shared library.
    folder : of the RecallSeg library to open.
    engine, k : of the segmenter.

    Raises
    ------
    InputError
        If the file cannot be loaded.
    RecallSegError
        If a call fails: its status and message.
    """

    def __init__(self, file: Path, folder: Path, *, engine: str, k: int) -> None:
        try:
            self._c = c.CDLL(str(file))
        except OSError as error:
            raise InputError(f"{file} cannot be loaded: {error}.") from error
        self._c.recallseg_last_error.restype = c.c_char_p
        self._check(self._c.recallseg_init(c.c_uint32(ABI_VERSION), None))
        self._library, self._segmenter = c.c_void_p(), c.c_void_p()
        self._check(
            self._c.recallseg_library_open(str(folder).encode(), None, c.byref(self._library))
        )
        options = _SegmenterOptions(c.sizeof(_SegmenterOptions), k, engine=engine.encode())
        self._check(
            self._c.recallseg_segmenter_open(
                self._library, c.byref(options), c.byref(self._segmenter)
            )
        )

    def segment(self, image: Any, label_map: Any) -> None:
        """Segment a C-contiguous uint8 HxW image into a label map of its shape."""
        rows, columns = image.shape
        source = _Image(c.sizeof(_Image), UINT8, image.ctypes.data, 2)
        source.shape[:2] = (rows, columns)
        target = _Output(c.sizeof(_Output), 0, rows, columns, label_map.ctypes.data)
        result = c.c_void_p()
        self._check(
            self._c.recallseg_segment(
                self._segmenter,
                c.byref(source),
                c.byref(target),
                c.c_double(60e3),
                c.byref(result),
            )
        )
        self._check(self._c.recallseg_result_close(result))

    def close(self) -> None:
        """Close the segmenter and the library."""
        self._check(self._c.recallseg_segmenter_close(self._segmenter))
        self._check(self._c.recallseg_library_close(self._library))

    def _check(self, status: int) -> None:
        if status:
            raise RecallSegError(f"status {status}: {self._c.recallseg_last_error().decode()}")


@dataclass(frozen=True)
class Overhead:
    """Milliseconds of the Python call, of the C call, and of C less Python in the same round."""

    rounds: int
    side: int
    python: Distribution
    c: Distribution
    difference: Distribution


@dataclass(frozen=True, kw_only=True)
class OverheadReport(Head):
    """``bench capi``: what a call through the C ABI costs; ``engine`` and ``k`` of both calls."""

    schema: ClassVar[str] = "recallseg-bench-capi/1"

    engine: str
    k: int
    overhead: Overhead


def measure_overhead(
    file: Path,
    *,
    side: int = 512,
    rounds: int = 200,
    clock: Callable[[], float] = perf_counter,
) -> Overhead:
    """Measure on a random image; the two must agree in every pixel.

    Parameters
    ----------
    clock : in seconds; ``process_time`` where others use the machine too.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (K, side, side), np.uint8)
    mask = np.zeros((side, side), bool)
    mask[side // 4 : side // 2, side // 4 : side // 2] = True
    with TemporaryDirectory() as folder:
        with Library.create(Path(folder, "lib"), Bundle.open("demo"), engine="fake") as filled:
            for image in images:
                filled.add(image, {"square": mask})
        with Library.open(Path(folder, "lib")) as library:
            segmenter = Segmenter(library, k=K, engine="fake")
            native = CLibrary(file, Path(folder, "lib"), engine="fake", k=K)
            out = np.empty((2, side, side), np.uint8)

            def by_python() -> None:
                segmenter.segment(images[0], deadline_ms=60e3, out=(out[0], None))

            def by_c() -> None:
                native.segment(images[0], out[1])

            spent: tuple[list[float], list[float]] = ([], [])
            for number in range(rounds + LEAST_ROUNDS):
                calls = (by_python, by_c)
                for which in (0, 1) if number % 2 else (1, 0):
                    start = clock()
                    calls[which]()
                    if number >= LEAST_ROUNDS:  # the first ones warm up
                        spent[which].append((clock() - start) * 1e3)
            native.close()
    if not (out[0] == out[1]).all():
        raise RecallSegError("librecallseg and the Python call gave different label maps.")
    difference = [ours - theirs for theirs, ours in zip(*spent, strict=True)]
    return Overhead(
        rounds,
        side,
        Distribution.of(spent[0]),
        Distribution.of(spent[1]),
        Distribution.of(difference),
    )


def capi(
    file: Annotated[Path, typer.Argument(metavar="LIBRARY", help="librecallseg.so.")],
    output: Annotated[Path, typer.Option(help="Folder for capi.json.")],
    query_size: Annotated[int, typer.Option("--query-size", min=16, help="Side in pixels.")] = 512,
    rounds: Annotated[int, typer.Option(min=LEAST_ROUNDS, help="Pairs of calls.")] = 500,
) -> None:
    """Measure what a call through the C ABI costs beside the Python call."""
    conditions, watch = describe_conditions(), Watch()
    found = measure_overhead(file, side=query_size, rounds=rounds)
    conditions |= watch.stop()
    report = OverheadReport(**head(conditions), engine="fake", k=K, overhead=found)
    report.save(output / "capi.json")
    typer.echo(
        f"{query_size} x {query_size}, {rounds} pairs: Python p50 {found.python.p50:.3f} ms, C p50 "
        f"{found.c.p50:.3f} ms; C less Python p50 {found.difference.p50:.3f} ms, p95 "
        f"{found.difference.p95:.3f} ms"
    )
