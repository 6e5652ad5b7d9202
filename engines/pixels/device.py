"""Pixels on the GPU: arguments of the CUDA kernels of ``engines/native/pixels/kernels.cu``.

They give the same bits as the native kernels on the CPU. Arrays are whatever has a
``__cuda_array_interface__``; nothing is allocated, copied to the host or waited for here.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, ClassVar, Protocol

import numpy as np

from recallseg.engines.bundle import Normalisation
from recallseg.engines.errors import EngineUnavailableError, InputError
from recallseg.engines.pixels.interface import (
    MOST_STRUCTURES,
    check_shape,
    percentile_ranks,
    window_gain,
)
from recallseg.engines.pixels.native import DTYPES

__all__ = ["DevicePixels", "Kernels", "kernel_image"]

SPAN_BYTES = 20  # struct Span of core.h
_WHOLE, _HALF, _COARSE, _RUN, _RANKS = 65536 + 32768, 65536, 256, 8, 6  # of kernels.cu
_HEAD_BYTES = 136  # struct Found of kernels.cu
_WRONG = slice(8, 12)
_SQUARE = (32, 8, 1)
_LINE = (256, 1, 1)
_NARROW = (32, 1, 1)  # where each thread reads a lot
_MOST_BLOCKS_Y = 65535  # CUDA's limit on the second and third side of a grid
_FOUR = 4  # numbers of a memory per thread


class Kernels(Protocol):
    """A loaded image of kernels; see ``engines/device``."""

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Any],
        stream: Any,
        shared_bytes: int = 0,
    ) -> None:
        """Enqueue a kernel with ctypes scalars as arguments."""


def kernel_image() -> bytes:
    """Return the compiled kernels (a fatbin) to load.

    Raises
    ------
    EngineUnavailableError
        If they were not built.
    """
    file = files("recallseg.engines.pixels") / "pixels.fatbin"
    if not file.is_file():
        raise EngineUnavailableError(
            "the CUDA pixel kernels were not built: install recallseg with '-C wheel.cmake=true' "
            "where there is an nvcc (docs/contribute/native-kernels.md)."
        )
    return file.read_bytes()


class DevicePixels:
    """Launches on the caller's stream; see :class:`~recallseg.engines.pixels.interface.Pixels`.

    Parameters
    ----------
    kernels : made of :func:`kernel_image`.
    scratch : at least :meth:`scratch_bytes` bytes on the device, and nobody else's: the weights of
        the last resize stay there, for the next one of the same sizes. All calls of an object are
        for one stream.
    """

    def __init__(self, kernels: Kernels, scratch: Any) -> None:
        self._kernels = kernels
        self.scratch = scratch  # its memory lives as long as this
        self._scratch = _Array.of(scratch)
        self._resized: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @staticmethod
    def scratch_bytes(height: int, width: int) -> int:
        """Return the scratch that targets of up to this size need."""
        return SPAN_BYTES * (height + width)

    WRONG: ClassVar[slice] = _WRONG
    """Where in the room of :meth:`percentile_window` the number of NaN and infinite pixels stands,
    uint32, in bytes."""

    @staticmethod
    def window_bytes(dtype: Any) -> int:
        """Return what :meth:`percentile_window` needs for images of a dtype."""
        counters, parts = _counters(np.dtype(dtype))
        return _HEAD_BYTES + 4 * (counters + parts)

    def percentile_window(
        self, image: Any, low: float, high: float, room: Any, stream: Any
    ) -> None:
        """Find the window between two percentiles where the image is; nobody waits for it.

        The bits are those of :func:`~recallseg.runtime.model.preprocess.intensity_window` for
        ``percentile``. ``room`` then begins with the window, for :meth:`prepare`. Of an image with
        NaN or infinite pixels, which that refuses, the window is of no use: see :attr:`WRONG`.

        Parameters
        ----------
        image : as for :meth:`prepare`.
        low, high : percentiles, 0..100.
        room : :meth:`window_bytes` bytes on the device, aligned to 8.

        Raises
        ------
        InputError
            If a shape, dtype or the room does not fit.
        """
        source, head, counters, coarse = self._count(image, room, stream)
        size = int(np.prod(source.shape))
        ranks, shares = percentile_ranks(size, low, high)
        wanted = [c.c_int64(rank) for rank in (*ranks, 0, size - 1)]
        floats = source.dtype == np.float32
        parts = (_HALF if floats else _WHOLE) // _COARSE
        between, six = [c.c_double(share) for share in shares], (_RANKS, 1, 1)
        self._sum(counters, parts, coarse, stream)
        self._kernels.launch(
            "recallseg_rank",
            (1, 1, 1),
            six,
            (
                *map(c.c_void_p, (counters, coarse)),
                *(c.c_int32(parts), source.pixel()),
                *(*wanted, *between, head),
            ),
            stream,
        )
        if not floats:
            return
        counters += 4 * _HALF
        coarse += 4 * parts
        self._over_pixels("recallseg_refine", source, c.c_void_p(counters), head, stream)
        self._sum(counters, _RANKS * parts, coarse, stream)
        self._kernels.launch(
            "recallseg_rank_low",
            (1, 1, 1),
            six,
            (*map(c.c_void_p, (counters, coarse)), *between, head),
            stream,
        )

    def count_wrong(self, image: Any, room: Any, stream: Any) -> None:
        """Count an image's NaN and infinite pixels into ``room``; see :meth:`percentile_window`."""
        self._count(image, room, stream)

    def _count(self, image: Any, room: Any, stream: Any) -> tuple[_Array, c.c_void_p, int, int]:
        """Count pixels by value; return the image, what is found, counters and room for sums."""
        source, place = self._image(image), _Array.of(room)
        needed = self.window_bytes(source.dtype)
        if place.nbytes < needed or place.pointer % 8:
            raise InputError(
                f"percentiles need {needed} bytes aligned to 8, got {place.nbytes} at "
                f"{place.pointer:#x}."
            )
        number = _counters(source.dtype)[0]
        counters = place.pointer + _HEAD_BYTES
        words = _HEAD_BYTES // 4 + number
        head = c.c_void_p(place.pointer)
        self._kernels.launch(
            "recallseg_clear", _grid(words, 1, _LINE), _LINE, (head, c.c_int64(words)), stream
        )
        self._over_pixels("recallseg_histogram", source, c.c_void_p(counters), head, stream)
        return source, head, counters, counters + 4 * number

    def _over_pixels(
        self, name: str, source: _Array, counters: c.c_void_p, head: c.c_void_p, stream: Any
    ) -> None:
        rows, columns = source.shape[:2]
        self._kernels.launch(
            name,
            _grid(-(-columns // _RUN), rows, _SQUARE),
            _SQUARE,
            (*source.pixels(), c.c_int32(rows), c.c_int32(columns), counters, head),
            stream,
        )

    def _sum(self, counters: int, parts: int, coarse: int, stream: Any) -> None:
        self._kernels.launch(
            "recallseg_coarse",
            _grid(parts, 1, _NARROW),
            _NARROW,
            (c.c_void_p(counters), c.c_int64(parts), c.c_void_p(coarse)),
            stream,
        )

    def prepare(
        self,
        image: Any,
        window: tuple[float, float] | Any,
        out: Any,
        normalisation: Normalisation,
        stream: Any,
    ) -> None:
        """Make a network input; meaning as :meth:`Pixels.prepare` has it.

        Parameters
        ----------
        image : HxW or HxWx3, uint8, int16, uint16 or float32, strides in multiples of its items.
        window : as there, or the room that :meth:`percentile_window` was given.
        out : 1x3xSxS float32 or float16, C-contiguous.

        Raises
        ------
        InputError
            If a shape, dtype or window does not fit, or the scratch is too small.
        """
        source, target = self._image(image), _Array.of(out)
        side = target.shape[-1] if target.shape else 0
        target.must_be((np.float32, np.float16), "a network input", (1, 3, side, side))
        target.must_be_contiguous()
        height, width = source.shape[:2]
        there, ends, gain = c.c_void_p(None), (0.0, 0.0), np.float32(0)
        if isinstance(window, tuple):
            ends, gain = window, window_gain(*window)
        else:
            there = c.c_void_p(_Array.of(window).pointer)
        rule, y, x = self._spans((height, width), (side, side), stream)
        self._kernels.launch(
            "recallseg_prepare",
            _grid(side, side, _SQUARE),
            _SQUARE,
            (
                *source.pixels(),
                rule,
                y,
                x,
                there,
                c.c_float(ends[0]),
                c.c_float(float(gain)),
                *(c.c_float(mean) for mean in normalisation.mean),
                *(c.c_float(1.0 / std) for std in normalisation.std),
                c.c_int32(side),
                c.c_int32(target.dtype == np.float16),
                c.c_void_p(target.pointer),
            ),
            stream,
        )

    @staticmethod
    def _image(image: Any) -> _Array:
        source = _Array.of(image)
        source.must_be(DTYPES, "an image on the device")
        check_shape(source.shape)
        return source

    def finish(
        self,
        logits: Any,
        object_scores: Any,
        iou: Any,
        numbers: Any,
        label_map: Any,
        masks: Any,
        stream: Any,
    ) -> None:
        """Make masks and a label map; meaning as :meth:`Pixels.finish` has it.

        Parameters
        ----------
        logits : nxhxw float32, C-contiguous. NaN is not looked for: it is below every threshold.
        object_scores : n float32; a structure is present if its score is above 0.
        iou : n float32.
        numbers : 2xn float32, written: IoU estimates and scores, to be fetched with the masks.
        label_map, masks : uint8 HxW and boolean (or uint8) nxHxW of any strides, written.

        Raises
        ------
        InputError
            If a shape or dtype does not fit, or the scratch is too small.
        """
        source, scores = _Array.of(logits), _Array.of(object_scores)
        labels, planes = _Array.of(label_map), _Array.of(masks)
        source.must_be((np.float32,), "logits")
        source.must_be_contiguous()
        if len(source.shape) != 3 or 0 in source.shape[1:] or source.shape[0] > MOST_STRUCTURES:
            raise InputError(
                f"logits must be nxhxw with n up to {MOST_STRUCTURES}, got {source.shape}."
            )
        n, rows, columns = source.shape
        estimates, copied = _Array.of(iou), _Array.of(numbers)
        for array, what, shape in (
            (scores, "object scores", (n,)),
            (estimates, "IoU estimates", (n,)),
            (copied, "numbers", (2, n)),
        ):
            array.must_be((np.float32,), what, shape)
            array.must_be_contiguous()
        labels.must_be((np.uint8,), "the label map")
        if len(labels.shape) != 2:
            raise InputError(f"the label map must be HxW, got {labels.shape}.")
        height, width = labels.shape
        planes.must_be((np.bool_, np.uint8), "masks", (n, height, width))
        rule, y, x = self._spans((rows, columns), (height, width), stream)
        self._kernels.launch(
            "recallseg_finish",
            _grid(width, height, _SQUARE),
            _SQUARE,
            (
                c.c_void_p(source.pointer),
                *(c.c_void_p(array.pointer) for array in (scores, estimates, copied)),
                c.c_int32(n),
                c.c_int32(rows),
                c.c_int32(columns),
                rule,
                y,
                x,
                c.c_int32(height),
                c.c_int32(width),
                c.c_void_p(labels.pointer),
                *(c.c_int64(stride) for stride in labels.strides),
                c.c_void_p(planes.pointer),
                *(c.c_int64(stride) for stride in planes.strides),
            ),
            stream,
        )

    def gather(
        self, bank: Any, places: Any, out: Any, stream: Any, scales: Any | None = None
    ) -> None:
        """Decode memories by an index list; meaning as :meth:`Pixels.gather` has it.

        Parameters
        ----------
        bank : RxTxd float16, int8 with ``scales``, or float32; on the device, or pinned and mapped.
            The last two axes are packed, records may be further apart.
        places : k int64 on the device: which records, each below R; where one is below 0 nothing
            is written. They are not checked here.
        out : kxTxd float32 or float16, C-contiguous; d is a multiple of four. Of a bank of float32
            it is that too.
        scales : RxT float32, C-contiguous.

        Raises
        ------
        InputError
            If a shape, dtype or alignment does not fit.
        """
        source, chosen, target = _Array.of(bank), _Array.of(places), _Array.of(out)
        whole = source.dtype == np.float32 and scales is None
        source.must_be(
            (np.float16, np.float32) if scales is None else (np.int8,), "a bank of memories"
        )
        target.must_be((np.float32,) if whole else (np.float32, np.float16), "memories")
        target.must_be_contiguous()
        if len(source.shape) != 3 or target.shape[1:] != source.shape[1:]:
            raise InputError(f"a bank {source.shape} does not fill memories {target.shape}.")
        k, tokens, width = target.shape
        item = source.dtype.itemsize
        if source.strides[1:] != (width * item, item):
            raise InputError("tokens of a bank must be packed: copy it.")
        four = _FOUR * item
        if width % _FOUR or source.pointer % four or source.strides[0] % four:
            raise InputError(
                f"memories are read {_FOUR} numbers at a time: expected a multiple of {_FOUR} per "
                f"token and records aligned to {four} bytes."
            )
        if target.pointer % (_FOUR * target.dtype.itemsize):
            raise InputError(
                f"memories are written {_FOUR} numbers at a time: expected them aligned to "
                f"{_FOUR * target.dtype.itemsize} bytes."
            )
        chosen.must_be((np.int64,), "places", (k,))
        chosen.must_be_contiguous()
        if 0 in target.shape:
            return
        fours = tokens * width // _FOUR
        half, to = c.c_int32(target.dtype == np.float16), c.c_void_p(target.pointer)
        record = (c.c_void_p(source.pointer), c.c_int64(source.strides[0]))
        where = (c.c_void_p(chosen.pointer), c.c_int64(fours))
        grid = _grid(fours, k, _LINE)
        if whole:
            self._kernels.launch(
                "recallseg_gather_float", grid, _LINE, (*record, *where, to), stream
            )
            return
        if scales is None:
            self._kernels.launch(
                "recallseg_gather_half", grid, _LINE, (*record, *where, half, to), stream
            )
            return
        scale = _Array.of(scales)
        scale.must_be((np.float32,), "scales", (source.shape[0], tokens))
        scale.must_be_contiguous()
        self._kernels.launch(
            "recallseg_gather_int8",
            grid,
            _LINE,
            (*record, c.c_void_p(scale.pointer), *where, c.c_int32(width), half, to),
            stream,
        )

    def _spans(
        self, source: tuple[int, ...], target: tuple[int, ...], stream: Any
    ) -> tuple[c.c_int32, c.c_void_p, c.c_void_p]:
        """Enqueue the weights of both axes, if they are others than the last ones.

        Returns the rule and where they are, y and x.
        """
        needed = self.scratch_bytes(*target)
        if self._scratch.nbytes < needed or self._scratch.pointer % 4:
            raise InputError(
                f"the scratch has {self._scratch.nbytes} bytes; a target of {target[0]}x{target[1]}"
                f" needs {needed}, aligned to 4."
            )
        if 0 in target:
            raise InputError("the target is empty.")
        grows = target[0] >= source[0] and target[1] >= source[1]
        shrinks = target[0] <= source[0] and target[1] <= source[1]
        rule = c.c_int32(0 if grows else 1 if shrinks else 2)  # enum Rule of core.h
        y = c.c_void_p(self._scratch.pointer)
        x = c.c_void_p(self._scratch.pointer + SPAN_BYTES * target[0])
        resize = (source, target)
        if self._resized == resize:
            return rule, y, x
        self._resized = None
        for axis, spans in ((0, y), (1, x)):
            self._kernels.launch(
                "recallseg_spans",
                _grid(target[axis], 1, _LINE),
                _LINE,
                (c.c_int32(source[axis]), c.c_int32(target[axis]), rule, spans),
                stream,
            )
        self._resized = resize
        return rule, y, x


@dataclass(frozen=True)
class _Array:
    """What ``__cuda_array_interface__`` says, strides in bytes."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, array: Any) -> _Array:
        found = getattr(array, "__cuda_array_interface__", None)
        if found is None:
            raise InputError(
                f"expected an array on the device, got {type(array).__name__} without "
                "__cuda_array_interface__."
            )
        dtype, shape = np.dtype(found["typestr"]), tuple(found["shape"])
        packed = [dtype.itemsize]
        for size in reversed(shape[1:]):
            packed.append(packed[-1] * size)
        strides = tuple(found.get("strides") or reversed(packed[: len(shape)]))
        return cls(int(found["data"][0]), shape, strides, dtype)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def pixel(self) -> c.c_int32:
        """Say of which dtype pixels are."""
        return c.c_int32([np.dtype(kind) for kind in DTYPES].index(self.dtype))

    def pixels(self) -> tuple[Any, ...]:
        """Say where the pixels of an image are: data, dtype, channels and strides."""
        colour = len(self.shape) == 3
        return (
            c.c_void_p(self.pointer),
            self.pixel(),
            c.c_int32(3 if colour else 1),
            *(c.c_int64(stride) for stride in self.strides),
            *(() if colour else (c.c_int64(0),)),
        )

    def must_be(
        self, dtypes: Sequence[Any], what: str, shape: tuple[int, ...] | None = None
    ) -> None:
        if self.dtype not in [np.dtype(kind) for kind in dtypes]:
            names = ", ".join(np.dtype(kind).name for kind in dtypes)
            raise InputError(f"{what} must be {names}, got {self.dtype}.")
        if shape is not None and self.shape != shape:
            raise InputError(f"{what} must have shape {shape}, got {self.shape}.")
        if any(part % self.dtype.itemsize for part in (self.pointer, *self.strides)):
            raise InputError(f"{what} must be aligned to {self.dtype.itemsize} bytes; copy it.")

    def must_be_contiguous(self) -> None:
        if 0 in self.shape:  # whatever its strides are (drivers give zeros), there is nothing
            return
        expected = self.dtype.itemsize
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                raise InputError(
                    f"expected a C-contiguous array, got {self.shape} with strides {self.strides}."
                )
            expected *= size


def _counters(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return how many counters the percentiles of a dtype take, and how many sums of them."""
    number = (1 + _RANKS) * _HALF if dtype == np.float32 else _WHOLE
    return number, number // _COARSE


def _grid(x: int, y: int, block: tuple[int, int, int]) -> tuple[int, int, int]:
    blocks = -(-x // block[0]), -(-y // block[1])
    if blocks[1] > _MOST_BLOCKS_Y:
        raise InputError(f"{y} rows are more than a grid of the device takes.")
    return (*blocks, 1)
