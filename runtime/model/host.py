"""A model on the CPU: numpy arrays from end to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.budget import encoding_bytes
from recallseg.engines.buffer_shapes import Shapes, bytes_of
from recallseg.engines.bundle import Bundle
from recallseg.engines.device import Device, adopt_tensor, on_gpu, open_device
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import HostMemoryError
from recallseg.engines.onnxruntime_cpu import usable_cores
from recallseg.engines.pixels import Pixels, open_pixels
from recallseg.runtime.arrays import as_array
from recallseg.runtime.checks import check_image
from recallseg.runtime.library.exemplar import StoredMemory
from recallseg.runtime.model.model import Model
from recallseg.runtime.model.postprocess import finish_masks
from recallseg.runtime.model.preprocess import Intensity, intensity_window
from recallseg.runtime.model.view import Finished, Gather, Refine, Stored
from recallseg.runtime.segmenting.presence import ABSENT_SCORE

__all__ = ["HostModel", "available_memory", "host_copy"]


MOST_LANES = 4
"""Images encoded at once, at most. Threads that share one wait for each other at every operator;
with an image each they do not, and each needs memory (docs/contribute/measurements.md)."""
LANE_IMAGES = 16
"""Images that a lane must have to do, or loading its graphs takes longer than it saves."""


class HostModel(Model):
    """See :class:`Model`."""

    def __init__(
        self, bundle: Bundle, engine: str, precision: str, options: EngineOptions, keep_bytes: int
    ) -> None:
        super().__init__(bundle, engine, precision, options, keep_bytes)
        self._pixels = open_pixels()  # may hold buffers on the query's grid
        self._source: Device | None = None  # of frames that lie on a GPU

    @property
    def pixels(self) -> Pixels:
        """What touches pixels."""
        return self._pixels

    def lanes(self, images: int) -> tuple[Model, ...]:
        threads = self.threads or usable_cores()
        free, needed = available_memory(), encoding_bytes(self.bundle, self.engine, self.precision)
        room = MOST_LANES if free is None else free // 2 // needed
        count = min(threads, MOST_LANES, images // LANE_IMAGES, room)
        if count < 2 or self.closed:
            return (self,)
        options = replace(self._options, threads=threads // count)
        lane = (self.bundle, self.engine, self.precision, options, 0)
        return tuple(HostModel(*lane) for _ in range(count))

    @property
    def nbytes(self) -> int:
        return self._buffers.nbytes + self._kept.nbytes + self._pixels.nbytes

    def copy_frame(self, image: Any) -> NDArray[Any]:
        if not on_gpu(image):
            return host_copy(image)
        self._source = device = self._source or open_device()
        device.enter()
        tensor = adopt_tensor(image, device)
        array = np.empty(tensor.shape, tensor.dtype)
        if array.size:
            device.synchronize()
            device.stream.copy_out(array, tensor)
            device.stream.synchronize()
        return array

    def _adopted(self, array: Any) -> NDArray[Any]:
        return as_array(array, "an array")

    def _blank(self, tensor: NDArray[Any]) -> None:
        tensor[...] = 0

    def _allocate(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        try:
            return np.zeros(shape, np.float32)
        except MemoryError as error:
            raise HostMemoryError(
                f"the system refused {4 * prod(shape) / 2**20:.0f} MiB of memory for a model's "
                "buffers. Close other programs, or ask for a smaller k or fewer structures."
            ) from error

    def _copy(self, target: NDArray[Any], source: NDArray[Any]) -> None:
        target[...] = source

    def _write(self, target: NDArray[Any], array: NDArray[np.float32]) -> None:
        target[...] = array

    def _place_prompts(self, prompts: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        return dict(prompts)

    def _fetch(self, tensor: NDArray[Any]) -> NDArray[Any]:
        array: NDArray[Any] = tensor.copy()
        return array

    def _require(
        self, shapes: Shapes, recalled: int, stored: Stored, graphs: Sequence[str], what: str
    ) -> None:
        needed, free = bytes_of(shapes), available_memory()
        if free is not None and needed > free:
            raise HostMemoryError(
                f"{what} needs {needed / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB of this "
                "machine's memory are free. Close other programs, or ask for a smaller k or fewer "
                "structures."
            )

    def _settle(self, beginning: str) -> None:
        """Nothing is ever queued."""

    def _release(self) -> None:
        self._pixels, self._source = open_pixels(), None

    def _fill(self, names: Shapes, recalled: int, stored: Stored) -> None:
        if "pointer_time" in names:
            self._buffers["pointer_time"][:] = self.bundle.memory.pointer_time

    def _check(self, image: Any) -> NDArray[Any]:
        return check_image(image)

    def _prepare(self, image: NDArray[Any], intensity: Intensity, graphs: Sequence[str]) -> None:
        normalisation = self.bundle.normalisation
        targets = [(self._buffers[f"{name}_image"], normalisation[name]) for name in graphs]
        window = intensity_window(image, intensity, self._pixels)
        self._pixels.prepare(image, window, targets)
        self._seen = image, window

    def _embed(self, encode: bool) -> tuple[NDArray[np.float32], bool]:
        self._run("embed")
        return self._buffers["embedding"][0].copy(), False

    def _recall(
        self,
        gather: Gather,
        memories: Sequence[Sequence[StoredMemory]],
        tokens: NDArray[np.float32],
        pointers: NDArray[np.float32],
    ) -> None:
        for row, some in enumerate(memories):
            gather(some, tokens[row, : len(some)], pointers[row, : len(some)])

    def _leave_out(self, rows: Sequence[int]) -> None:
        for name, value in (
            ("all_logits", np.nan),
            ("all_iou", 0.0),
            ("all_scores", ABSENT_SCORE),
        ):
            self._buffers[name][rows] = value

    def _finish(
        self, n: int, of: int, shape: tuple[int, int], out: tuple[Any, Any], refine: Refine | None
    ) -> tuple[Callable[[], Finished], NDArray[np.float32] | None]:
        logits, iou, scores = (
            self._buffers[f"all_{name}"][:n] for name in ("logits", "iou", "scores")
        )
        refined, small = None, [False] * n
        if refine is not None:
            every, small = self._refined(refine, self._buffers["all_logits"][:of])
            logits = refined = every[:n]
            small = small[:n]
        present = [bool(score > 0) and not left for score, left in zip(scores, small, strict=True)]
        masks, label_map = finish_masks(logits, present, shape, self._pixels, out)
        finished = Finished([*masks], label_map, iou.copy(), scores.copy(), small)
        return lambda: finished, refined

    def _masks(self, n: int) -> NDArray[np.float32]:
        masks: NDArray[np.float32] = self._buffers.of("memorize", n)["masks"]
        return masks

    def _memorize(self, masks: NDArray[np.float32]) -> None:
        self._run("memorize", len(masks))


def host_copy(image: Any) -> NDArray[Any]:
    """Return a copy of what :func:`recallseg.runtime.arrays.as_array` takes."""
    return np.array(as_array(image, "a frame"))


def available_memory() -> int | None:
    """Return the bytes of the machine's memory that programs may still take; None if unknown."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None  # no Linux
    return None
