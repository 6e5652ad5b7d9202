"""A model on a GPU: one upload, one download, and nothing waited for in between but the embedding.

``embed`` runs on a stream of its own beside ``encode``, and the search on the CPU beside both. What
is queued for one query needs no memory of the host once its successor's embedding is here, since
that comes after all of it; only its result has memory of its own (:mod:`.flights`).
Pixels are prepared and finished on the device where its kernels were built
(docs/contribute/native-kernels.md), and on the CPU where they were not. It is tested on a stand-in
whose results are the CPU's, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.budget import graph_bytes
from recallseg.engines.buffer_shapes import Shapes, bytes_of
from recallseg.engines.bundle import Bundle
from recallseg.engines.device import Device, DeviceTensor, adopt_tensor, on_gpu, open_device
from recallseg.engines.device.recording import beside
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import EngineUnavailableError, InputError
from recallseg.engines.pixels import open_pixels
from recallseg.engines.pixels.device import DevicePixels, kernel_image
from recallseg.engines.pixels.interface import check_shape
from recallseg.engines.pixels.native import DTYPES
from recallseg.engines.registry import engine_class
from recallseg.runtime.checks import check_image, not_finite
from recallseg.runtime.library.exemplar import StoredMemory
from recallseg.runtime.model.device_room import Frames, Places, Room
from recallseg.runtime.model.flights import Flight, Flights
from recallseg.runtime.model.host import host_copy
from recallseg.runtime.model.memory_cache import MemoryCache, copy_stored
from recallseg.runtime.model.model import GpuOptions, Model
from recallseg.runtime.model.postprocess import check_out, finish_masks
from recallseg.runtime.model.preprocess import Intensity, intensity_window, prepare_image
from recallseg.runtime.model.view import Finished, Gather, Refine, Stored
from recallseg.runtime.segmenting.presence import ABSENT_SCORE

__all__ = ["DeviceModel"]

NOWHERE = -1
"""What a memory that is not gathered has in the place of a slot."""
ALIGNMENT = 16
"""Of what stands in one block of results, in bytes."""


class DeviceModel(Model):
    """See :class:`Model`."""

    device: Device

    def __init__(
        self, bundle: Bundle, engine: str, precision: str, gpu: GpuOptions, keep_bytes: int
    ) -> None:
        self.gpu = gpu
        self.device = device = gpu.device or open_device()
        device.enter()
        self._stream, self._side, self._incoming = (
            device.stream,
            *(device.new_stream() for _ in "ab"),
        )
        options = EngineOptions(
            device=device, streams={"embed": self._side}, cuda_graphs=gpu.cuda_graphs
        )
        super().__init__(bundle, engine, precision, options, keep_bytes)
        try:
            image = kernel_image()
        except EngineUnavailableError:
            self._kernels = None
        else:
            self._kernels = device.load_kernels(image)
        self.caches: dict[str, MemoryCache] = {}  # by the format of what is in them
        self._cache_bytes = gpu.cache_bytes
        self._room, self._flights = Room(device), Flights(device)
        self._frames, self._handing_over = Frames(device), Lock()
        self._on_device: dict[str, DevicePixels] = {}
        # How many pixels are looked at there for NaN and infinite ones, and how many that are.
        self._unchecked = 0
        self._wrong: NDArray[Any] = np.zeros(1, np.uint32)
        self._pixels = open_pixels()  # for percentiles, and for all of it without kernels
        self._prepared, self._embedded = device.new_event(), device.new_event()
        self._taken = device.new_event()  # recorded when masks have left their pinned memory
        self._places: Places | None = None
        self._gathered = 0
        # Whether work may be queued that an image, or a question, must not disturb.
        self._looking = self._asking = False
        # The last question that may still be in work while its successor is on its way, and the one
        # that was so when the image came.
        self._before: Flight | None = None
        self._before_look: Flight | None = None

    @property
    def nbytes(self) -> int:
        held = (self._buffers, self._kept, self._room, self._frames)
        cached = sum(cache.nbytes for cache in self.caches.values())
        return cached + sum(part.nbytes for part in held)

    def copy_frame(self, image: Any) -> Any:
        if not on_gpu(image):
            return host_copy(image)
        self.device.enter()
        # On a stream of its own: it must not wait for a query, nor be recorded as part of one.
        with self._handing_over, beside():
            tensor = adopt_tensor(image, self.device, self._incoming)
            copied = self._frames.tensor(tensor.shape, tensor.dtype)
            if tensor.nbytes:
                self._incoming.copy(copied, tensor)
                self._incoming.synchronize()
            return copied

    # Buffers

    def _adopted(self, array: Any) -> DeviceTensor:
        return adopt_tensor(array, self.device)

    def _blank(self, tensor: DeviceTensor) -> None:
        self._stream.fill(tensor)
        self._stream.synchronize()

    def _allocate(self, shape: tuple[int, ...]) -> DeviceTensor:
        return self.device.tensor(shape)

    def _copy(self, target: DeviceTensor, source: DeviceTensor) -> None:
        self._stream.copy(target, source)

    def _write(self, target: DeviceTensor, array: NDArray[np.float32]) -> None:
        self._stream.copy_in(target, np.ascontiguousarray(array))
        self._stream.synchronize()

    def _place_prompts(self, prompts: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        self._overtake()
        placed = {}
        for name, array in prompts.items():
            staged = self._room.pinned(name, array.shape, array.dtype)
            staged[...] = array
            placed[name] = self._room.on_device(name, array.shape, array.dtype)
            self._stream.copy_in(placed[name], staged)
        return placed

    def _fetch(self, tensor: DeviceTensor) -> NDArray[Any]:
        array = np.empty(tensor.shape, tensor.dtype)
        if array.size:
            self.device.enter()
            self._stream.copy_out(array, tensor)
            self._stream.synchronize()
        return array

    def _require(
        self, shapes: Shapes, recalled: int, stored: Stored, graphs: Sequence[str], what: str
    ) -> None:
        slots = self._slots(recalled, stored)
        cache = self._cache(stored.memory_format).growth_bytes(slots)
        missing = [graph for graph in graphs if graph not in self._engines]
        variants = engine_class(self.engine).variants
        weights = graph_bytes(self.bundle, missing, variants, self.precision)
        needed = bytes_of(shapes) + cache + weights
        if needed:
            self.device.require(
                needed,
                f"{what}, with a cache of {slots} memories and {weights / 2**20:.0f} MiB of "
                "weights,",
            )

    def _cache(self, memory_format: str) -> MemoryCache:
        """Return the cache of memories of this format; without kernels all are decoded before."""
        kept = "fp32" if self._kernels is None else memory_format
        if kept not in self.caches:
            self.caches[kept] = MemoryCache(self.device, self.bundle.geometry, kept)
        return self.caches[kept]

    def _slots(self, recalled: int, stored: Stored) -> int:
        """Return how many memories a cache should hold; what one question takes is never less."""
        cache = self._cache(stored.memory_format)
        others = sum(other.nbytes for other in self.caches.values() if other is not cache)
        within = max(0, self._cache_bytes - others) // cache.slot_bytes
        return max(recalled, min(within, stored.number)) if recalled else 0

    def _fill(self, names: Shapes, recalled: int, stored: Stored) -> None:
        if "pointer_time" in names:
            tensor = self._buffers["pointer_time"]
            constant = np.full(tensor.shape, self.bundle.memory.pointer_time, np.float32)
            self._stream.copy_in(tensor, constant)
            self._stream.synchronize()
        slots = self._slots(recalled, stored)
        self._cache(stored.memory_format).grow(slots, recalled, self._stream)
        if recalled and (self._places is None or self._places.count < recalled):
            self._places = Places(self.device, recalled)

    def _begin_turn(self) -> None:
        super()._begin_turn()
        self.device.enter()

    def _settle(self, beginning: str) -> None:
        # An image, or a question, that ended early left work behind that may still be done.
        left = {"look": self._looking or self._asking, "question": self._asking}
        if left.get(beginning, True) and not self.device.lost:
            self.device.enter()
            self.device.synchronize()
            self._looking = self._asking = False
            self._before = None
        if beginning == "question":
            self._asking, self._gathered = True, 0
            for cache in self.caches.values():
                cache.begin()

    def _overtake(self) -> None:
        """Wait for the question before, whose memory of the host is about to be written anew."""
        if self._before is not None:
            self._before.wait()
            self._before = None

    def _release(self) -> None:
        for cache in self.caches.values():
            cache.clear()
        self._room, self._frames = Room(self.device), Frames(self.device)
        self._flights, self._places = Flights(self.device), None
        self._on_device.clear()

    # An image

    def _check(self, image: Any) -> Any:
        if not on_gpu(image):
            return check_image(image)
        tensor = adopt_tensor(image, self.device)
        if self._kernels is None or tensor.dtype not in DTYPES:
            return check_image(self._fetch(tensor))
        check_shape(tensor.shape)
        return tensor

    def _prepare(self, image: Any, intensity: Intensity, graphs: Sequence[str]) -> None:
        self._looking, self._before_look = True, self._before
        normalisation = self.bundle.normalisation
        inputs = {name: self._buffers[f"{name}_image"] for name in graphs}
        if self._kernels is None:
            arrays = {n: self._room.pinned(n, t.shape, t.dtype) for n, t in inputs.items()}
            targets = [(array, normalisation[name]) for name, array in arrays.items()]
            prepare_image(image, intensity, self._pixels, *targets)
            for name, array in arrays.items():
                self._stream.copy_in(inputs[name], array)
        else:
            raw, window = self._place(image, intensity)
            for name, tensor in inputs.items():
                pixels = self._device_pixels(name, *tensor.shape[2:])
                pixels.prepare(raw, window, tensor, normalisation[name], self._stream)
        self._prepared.record(self._stream)
        if "embed" not in graphs:
            self._check_pixels(self._prepared.synchronize)

    def _place(self, image: Any, intensity: Intensity) -> tuple[Any, Any]:
        """Return an image on the device, and the window of its intensities, here or there."""
        self._unchecked = 0
        there = intensity.mode == "percentile" and image.dtype in DTYPES
        raw = image
        if not isinstance(image, DeviceTensor):
            dtype = image.dtype if image.dtype in DTYPES else np.dtype(np.float32)
            staged = self._room.pinned("image", image.shape, dtype)
            staged[...] = image
            raw = self._room.on_device("image", image.shape, dtype)
            self._stream.copy_in(raw, staged)
            if not there:
                return raw, intensity_window(image, intensity, self._pixels)
        floats = raw is image and raw.dtype.kind == "f"
        window: Any
        if there or floats:
            window = self._room.on_device(
                "window", (DevicePixels.window_bytes(raw.dtype),), np.uint8
            )
            pixels = self._device_pixels("window", 1, 1)
            if there:
                pixels.percentile_window(raw, intensity.low, intensity.high, window, self._stream)
            else:
                pixels.count_wrong(raw, window, self._stream)
            if floats:
                self._wrong = self._room.pinned("wrong", (1,), np.uint32)
                wrong = window[DevicePixels.WRONG]
                self._stream.copy_out(self._wrong.view(np.uint8), wrong)
                self._unchecked = prod(raw.shape)
        if not there:
            window = intensity_window(np.empty(0, raw.dtype), intensity, self._pixels)
        return raw, window

    def _check_pixels(self, wait: Callable[[], object]) -> None:
        """Raise InputError if an image on the device has NaN or infinite pixels, as for others."""
        size, self._unchecked = self._unchecked, 0
        if size:
            wait()
            if self._wrong[0]:
                raise not_finite(int(self._wrong[0]), size)

    def _embed(self, encode: bool) -> tuple[NDArray[np.float32], bool]:
        tensor = self._buffers["embedding"]
        found = self._room.pinned("embedding", tensor.shape, np.float32)
        self._side.wait(self._prepared)
        self._run("embed")
        self._side.copy_out(found, tensor)
        self._embedded.record(self._side)
        if encode:
            self._run("encode")
        self._embedded.synchronize()
        # The image has left its pinned memory, and what was queued before it is done.
        self._looking = False
        if self._before is self._before_look:
            self._before = None
        self._before_look = None
        self._check_pixels(lambda: None)
        return found[0].copy(), encode

    # A question

    def _recall(
        self,
        gather: Gather,
        memories: Sequence[Sequence[StoredMemory]],
        tokens: DeviceTensor,
        pointers: DeviceTensor,
    ) -> None:
        every = [memory for some in memories for memory in some]
        if not every:
            return
        self._overtake()
        cache = self._cache(every[0].memory_format)

        def decode(some: Sequence[StoredMemory], parts: Mapping[str, NDArray[Any]]) -> None:
            gather(some, parts["tokens"], parts["pointers"])

        fill = decode if self._kernels is None else copy_stored
        slots, banks = iter(cache.fetch(fill, every, self._stream)), cache.banks
        n, k = tokens.shape[:2]
        table = np.full((n, k), NOWHERE, np.int64)  # rows of frames' memories stay as they are
        for structure, some in enumerate(memories):
            table[structure, : len(some)] = [next(slots) for _ in some]
        if self._kernels is None or self._places is None:
            for structure, row in np.argwhere(table > NOWHERE).tolist():
                slot = int(table[structure, row])
                for into, part in ((tokens, "tokens"), (pointers, "pointers")):
                    self._stream.copy(into[structure][row], banks[part][slot])
            return
        places = self._places.put(self._gathered, table.reshape(-1), self._stream)
        self._gathered += table.size
        pixels, stream = self._device_pixels("window", 1, 1), self._stream
        rows, flat = (n * k, *tokens.shape[2:]), (n * k, 1, *pointers.shape[2:])
        pixels.gather(banks["tokens"], places, tokens.reshape(*rows), stream, banks.get("scales"))
        bank = banks["pointers"]
        one = bank.reshape(bank.shape[0], 1, bank.shape[1])
        pixels.gather(one, places, pointers.reshape(*flat), stream)

    def _leave_out(self, rows: Sequence[int]) -> None:
        self._overtake()
        absent = self._room.pinned("absent", (1,), np.float32)
        absent[:] = ABSENT_SCORE
        for row in rows:
            self._stream.fill(self._buffers["all_logits"][row], 0xFF)  # NaN
            self._stream.fill(self._buffers["all_iou"][row : row + 1])
            self._stream.copy_in(self._buffers["all_scores"][row : row + 1], absent)

    def _finish(
        self, n: int, of: int, shape: tuple[int, int], out: tuple[Any, Any], refine: Refine | None
    ) -> tuple[Callable[[], Finished], NDArray[np.float32] | None]:
        self._overtake()
        every = {name: self._buffers[f"all_{name}"][:n] for name in ("logits", "iou", "scores")}
        if self._kernels is None and any(one is not None and on_gpu(one) for one in out):
            raise InputError(
                "out lies on the GPU, and the pixel kernels that would write there were not "
                "built (docs/contribute/native-kernels.md). Pass numpy arrays."
            )
        logits, small = None, [False] * n
        if refine is not None:
            refined, small = self._refined(refine, self._fetch(self._buffers["all_logits"][:of]))
            logits, small = refined[:n], small[:n]
        if self._kernels is None:
            finished = self._finish_on_cpu(every, logits, small, shape, out)
            return lambda: finished, logits
        if logits is not None:
            staged = self._room.pinned("refined", logits.shape, np.float32)
            staged[...] = logits
            staged[small] = -1.0  # no mask
            every["logits"] = self._room.on_device("refined", logits.shape, np.float32)
            self._stream.copy_in(every["logits"], staged)
        return self._finish_there(every, small, shape, out), logits

    def _finish_on_cpu(
        self,
        every: dict[str, DeviceTensor],
        logits: NDArray[np.float32] | None,
        small: list[bool],
        shape: tuple[int, int],
        out: tuple[Any, Any],
    ) -> Finished:
        here = {}
        for name, tensor in every.items():
            if name != "logits" or logits is None:
                here[name] = self._room.pinned(name, tensor.shape, np.float32)
                self._stream.copy_out(here[name], tensor)
        self._stream.synchronize()
        present = [
            bool(score > 0) and not left for score, left in zip(here["scores"], small, strict=True)
        ]
        source = here["logits"] if logits is None else logits
        masks, label_map = finish_masks(source, present, shape, self._pixels, out)
        self._looking = self._asking = False
        return Finished([*masks], label_map, here["iou"].copy(), here["scores"].copy(), small)

    def _finish_there(
        self,
        every: dict[str, DeviceTensor],
        small: list[bool],
        shape: tuple[int, int],
        out: tuple[Any, Any],
    ) -> Callable[[], Finished]:
        """Queue masks and label map by the device's kernels, and one copy of all that goes back.

        Return what waits for it, and takes it where it belongs.
        """
        stream, n = self._stream, every["logits"].shape[0]
        given = [adopt_tensor(one, self.device) if on_gpu(one) else one for one in out]
        wanted = check_out(given, n, shape)
        if any(isinstance(one, DeviceTensor) and one.read_only for one in given):
            raise InputError("out lies in memory that its owner made read-only.")
        # Numbers first, then what does not stay on the device.
        parts: list[tuple[tuple[int, ...], Any]] = [((2, n), np.dtype(np.float32))]
        for one, part in zip(given, wanted, strict=True):
            if not isinstance(one, DeviceTensor):
                parts.append(part)
        places, end = [], 0
        for size, dtype in parts:
            places.append(slice(end, end + prod(size) * dtype.itemsize))
            end = -(-places[-1].stop // ALIGNMENT) * ALIGNMENT
        block = self._room.on_device("results", (end,), np.uint8)
        made = [
            DeviceTensor(block.address + place.start, size, dtype, block.owner)
            for place, (size, dtype) in zip(places, parts, strict=True)
        ]
        fetched = iter(made[1:])
        labels, planes = (one if isinstance(one, DeviceTensor) else next(fetched) for one in given)
        pixels = self._device_pixels("results", *shape)
        logits, scores, iou = (every[name] for name in ("logits", "scores", "iou"))
        pixels.finish(logits, scores, iou, made[0], labels, planes, stream)
        flight = self._flights.book()
        here = flight.take(end)
        stream.copy_out(here, block)
        flight.depart(stream)
        self._before, self._asking = flight, False

        def wait() -> Finished:
            flight.wait()
            arrived = iter(
                here[place].view(dtype).reshape(size)
                for place, (size, dtype) in zip(places, parts, strict=True)
            )
            iou, scores = next(arrived).copy()
            results: list[Any] = []
            for one, (size, dtype) in zip(given, wanted, strict=True):
                if not isinstance(one, DeviceTensor):
                    one = np.empty(size, dtype) if one is None else one
                    one[...] = next(arrived)
                results.append(one)
            flight.close()
            label_map, masks = results
            return Finished([masks[row] for row in range(n)], label_map, iou, scores, small)

        return wait

    def _masks(self, n: int) -> NDArray[np.float32]:
        self._taken.synchronize()
        shape = self._buffers.of("memorize", n)["masks"].shape
        return self._room.pinned("masks", shape, np.float32)

    def _memorize(self, masks: NDArray[np.float32]) -> None:
        n = len(masks)
        self._stream.copy_in(self._buffers.of("memorize", n)["masks"], masks)
        self._taken.record(self._stream)
        self._run("memorize", n)

    def _device_pixels(self, purpose: str, height: int, width: int) -> DevicePixels:
        """Return what works on targets of up to this size; the weights of a resize stay there."""
        size = DevicePixels.scratch_bytes(height, width)
        scratch = self._room.on_device(f"scratch of {purpose}", (size,), np.uint8)
        held = self._on_device.get(purpose)
        if held is None or held.scratch.address != scratch.address or held.scratch.nbytes < size:
            held = self._on_device[purpose] = DevicePixels(self._kernels, scratch)  # type: ignore[arg-type]
        return held
