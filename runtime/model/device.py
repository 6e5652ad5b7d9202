"""A query on a GPU: one upload, one download, and nothing waited for in between but the embedding.

``embed`` runs on a stream of its own beside ``encode``, and the search on the CPU beside both.
Pixels are prepared and finished on the device where its kernels were built
(docs/native-kernels.md), and on the CPU where they were not. Nothing here was executed on a GPU
yet; it is tested on a stand-in whose results are the CPU's, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.budget import graph_bytes
from recallseg.engines.composition import Composition
from recallseg.engines.device import Device, DeviceTensor, adopt_tensor, on_gpu, open_device
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import EngineRunError, EngineUnavailableError, InputError
from recallseg.engines.pixels import open_pixels
from recallseg.engines.pixels.device import DevicePixels, kernel_image
from recallseg.engines.pixels.native import DTYPES
from recallseg.engines.registry import engine_class, load_engines
from recallseg.runtime.checks import check_image
from recallseg.runtime.library import Library
from recallseg.runtime.model.device_workspace import DeviceWorkspace
from recallseg.runtime.model.frame_memories import TemporalMemories
from recallseg.runtime.model.interface import Finished, GpuOptions, Query, Wanted
from recallseg.runtime.model.memory_cache import MemoryCache
from recallseg.runtime.model.postprocess import finish_masks
from recallseg.runtime.model.preprocess import intensity_window, prepare_image
from recallseg.runtime.segmenting.presence import ABSENT_SCORE

__all__ = ["DeviceQuery"]


class DeviceQuery(Query):
    """See :class:`Query` and :func:`recallseg.runtime.model.query.open_query`."""

    workspace: DeviceWorkspace
    device: Device

    def __init__(
        self,
        library: Library,
        structures: Sequence[str],
        k: int,
        engine: str,
        precision: str,
        graphs: tuple[str, ...],
        gpu: GpuOptions,
    ) -> None:
        self._library, self._bundle = library, library.bundle
        self.device = device = gpu.device or open_device()
        device.enter()
        self._stream, self._side = device.stream, device.new_stream()
        n, geometry = len(structures), self._bundle.geometry
        try:
            image = kernel_image()
        except EngineUnavailableError:
            self._kernels = None
        else:
            self._kernels = device.load_kernels(image)
        dtype: Any = np.float32 if self._kernels is None else np.float16
        annotated = sum(library.count(name) for name in structures)
        slot = MemoryCache.slot_bytes(geometry, dtype)
        slots = max(n * k, min(gpu.cache_bytes // slot, annotated))
        weights = graph_bytes(self._bundle, graphs, engine_class(engine).variants, precision)
        device.require(
            DeviceWorkspace.required_bytes(self._bundle, n=n, k=k) + slots * slot + weights,
            f"A workspace for {n} structures and k = {k}, with a cache of {slots} memories and "
            f"{weights / 2**20:.0f} MiB of weights,",
        )
        streams = {"embed": self._side}
        options = EngineOptions(device=device, streams=streams, cuda_graphs=gpu.cuda_graphs)
        self._composition = Composition(
            load_engines(self._bundle, engine, precision, options=options, graphs=graphs)
        )
        self.workspace = DeviceWorkspace(device, self._bundle, n=n, k=k)
        self.group = self.workspace.group
        self.cache = MemoryCache(device, geometry, slots=slots, staged=n * k, dtype=dtype)
        self._places = device.allocate_pinned(8 * n * k)
        # Every block of the kernel reads them: across the bus only where there is none.
        address = self._places.device_address if device.facts.integrated else None
        self._places_there = (
            device.tensor((n * k,), np.int64)
            if address is None
            else DeviceTensor(address, (n * k,), np.dtype(np.int64), self._places)
        )
        self._pixels = open_pixels()  # for percentiles, and for all of it without kernels
        self._prepared, self._embedded = device.new_event(), device.new_event()
        self._graphs: tuple[str, ...] = ()
        self._members: list[int] = []
        self._size = (0, 0)  # n and k of the present group
        self._gathered = 0
        self._busy = False

    def check(self, image: Any) -> Any:
        if not on_gpu(image):
            return check_image(image)
        self.device.enter()
        tensor = adopt_tensor(image, self.device)
        if self._kernels is None or tensor.dtype not in DTYPES:
            return check_image(self._fetch(tensor))
        if len(tensor.shape) not in (2, 3) or tensor.shape[2:] not in ((), (3,)):
            raise InputError(f"an image must be HxW or HxWx3, got shape {tensor.shape}.")
        if tensor.nbytes == 0:
            raise InputError(f"the image is empty: its shape is {tensor.shape}.")
        return tensor

    def prepare(self, image: Any, *graphs: str) -> None:
        device, w = self.device, self.workspace
        device.enter()
        if self._busy:  # the last query ended early: its work may still read what is written now
            device.synchronize()
        self._busy, self._graphs, self._gathered = True, graphs, 0
        self.cache.begin()
        normalisation = self._bundle.normalisation
        inputs = {name: w.tensors[f"{name}_image"] for name in graphs}
        if self._kernels is None:
            arrays = {name: w.room.pinned(name, t.shape, t.dtype) for name, t in inputs.items()}
            targets = [(array, normalisation[name]) for name, array in arrays.items()]
            prepare_image(image, self._library.intensity, self._pixels, *targets)
            for name, array in arrays.items():
                self._stream.copy_in(inputs[name], array)
        else:
            raw, window = self._place(image)
            for name, tensor in inputs.items():
                pixels = self._device_pixels(*tensor.shape[2:])
                pixels.prepare(raw, window, tensor, normalisation[name], self._stream)
        scores = w.room.pinned("absent", w.all_scores.shape, np.float32)
        scores[:] = ABSENT_SCORE
        self._stream.copy_in(w.all_scores, scores)
        self._stream.fill(w.all_iou)
        self._prepared.record(self._stream)

    def embed(self) -> NDArray[np.float32]:
        w = self.workspace
        tensors = w.tensors
        found = w.room.pinned("embedding", tensors["embedding"].shape, np.float32)
        self._side.wait(self._prepared)
        names = {"image": tensors["embed_image"], "embedding": tensors["embedding"]}
        self._composition.run("embed", names)
        self._side.copy_out(found, tensors["embedding"])
        self._embedded.record(self._side)
        if "encode" in self._graphs:
            self._composition.run("encode", {**tensors, "image": tensors["encode_image"]})
        self._embedded.synchronize()
        embedding: NDArray[np.float32] = found[0]
        return embedding

    def encode(self) -> None:
        """Nothing is left to do: it was queued beside ``embed``."""

    def recall(self, wanted: Sequence[Wanted], k: int, temporal: TemporalMemories | None) -> None:
        w, n = self.workspace, len(wanted)
        self._members, self._size = [one.position for one in wanted], (n, k)
        memories, pointers = w.view("memories", n, k), w.tensors.get("pointers")
        for row, (position, stored) in enumerate(wanted):
            slots = self.cache.fetch(self._library, stored, self._stream)
            self._gather(slots, memories.row(row))
            if pointers is not None:
                target = pointers.reshape(n, k, pointers.shape[2]).row(row)
                for place, slot in enumerate(slots):
                    self._stream.copy(target.row(place), self.cache.pointers.row(slot))
            if temporal is not None:
                self._gather_temporal(temporal, position, row, len(stored))

    def attend(self) -> None:
        self._composition.run("attend", self._tensors())

    def decode(self) -> None:
        w, tensors = self.workspace, self._tensors()
        self._composition.run("decode", tensors)
        for row, index in enumerate(self._members):
            self._stream.copy(w.all_logits.row(index), tensors["logits"].row(row))
            self._stream.copy(w.all_iou.row(index), tensors["iou"].row(row))
            self._stream.copy(w.all_scores.row(index), tensors["object_score"].row(row))

    def finish(self, shape: tuple[int, int], out: tuple[Any, Any]) -> Finished:
        w, stream = self.workspace, self._stream
        iou = w.room.pinned("iou", w.all_iou.shape, np.float32)
        scores = w.room.pinned("scores", w.all_scores.shape, np.float32)
        stream.copy_out(iou, w.all_iou)
        stream.copy_out(scores, w.all_scores)
        if self._kernels is None:
            for given in out:
                if given is not None and on_gpu(given):
                    raise InputError(
                        "out lies on the GPU, and the pixel kernels that would write there were "
                        "not built (docs/native-kernels.md). Pass numpy arrays."
                    )
            logits = w.room.pinned("logits", w.all_logits.shape, np.float32)
            stream.copy_out(logits, w.all_logits)
            stream.synchronize()
            self._check_scores(iou, scores)
            present = [bool(score > 0) for score in scores]
            masks, label_map = finish_masks(logits, present, shape, self._pixels, out)
            planes: list[Any] = [*masks]
        else:
            planes, label_map = self._finish_here(shape, out)
            self._check_scores(iou, scores)
        self._busy = False
        return Finished(planes, label_map, iou.copy(), scores.copy())

    def memorize(
        self,
        masks: NDArray[np.float32],
        memories: NDArray[np.float32],
        pointers: NDArray[np.float32],
    ) -> None:
        room, stream = self.workspace.room, self._stream
        self._busy = True
        arrays = {"masks": masks, "memories": memories, "pointers": pointers}
        made = {}
        for name, array in arrays.items():  # room for the largest group: later calls take nothing
            full = (max(self.group, len(array)), *array.shape[1:])
            made[name] = room.on_device(f"new {name}", full, np.float32).rows(len(array))
        stream.copy_in(made["masks"], masks)
        self._composition.run("memorize", {**self.workspace.tensors, **made})
        stream.copy_out(memories, made["memories"])
        stream.copy_out(pointers, made["pointers"])
        stream.synchronize()
        self._busy = False

    def logits(self) -> NDArray[np.float32]:
        return self._fetch(self.workspace.all_logits)

    def _tensors(self) -> dict[str, DeviceTensor]:
        """Return the tensors of ``attend`` and ``decode`` for the present group."""
        return {name: self.workspace.view(name, *self._size) for name in self.workspace.tensors}

    def _gather(self, slots: Sequence[int], target: DeviceTensor) -> None:
        """Queue the copy of memories from the cache into the first rows of ``target``, kxTx64."""
        if self._kernels is None:
            for row, slot in enumerate(slots):
                self._stream.copy(target.row(row), self.cache.tokens.row(slot))
            return
        if not slots:
            return
        first, count = self._gathered, len(slots)
        self._gathered += count
        chosen = self._places.array.view(np.int64)[first : first + count]
        chosen[:] = slots
        places = self._places_there.part(first, count)
        if not self.device.facts.integrated:
            self._stream.copy_in(places, chosen)
        pixels = self._device_pixels(1, 1)
        pixels.gather(self.cache.tokens, places, target.rows(count), self._stream)

    def _gather_temporal(
        self, temporal: TemporalMemories, position: int, row: int, taken: int
    ) -> None:
        """Queue the upload of earlier frames' memories behind the ``taken`` rows of a structure."""
        w, (n, k) = self.workspace, self._size
        count = k - taken
        if count == 0:
            return
        made = {}
        for name in ("memories", "pointers"):
            full = w.tensors.get(name) or w.room.on_device(name, (1, 1, self._channels), np.float32)
            shape = (temporal.structures, temporal.size, *full.shape[2:])
            made[name] = w.room.pinned(f"temporal {name}", shape, np.float32)[position, :count]
        temporal.gather(position, made["memories"], made["pointers"])
        for name, array in made.items():
            if name in w.tensors:
                target = w.view(name, n, k).row(row)
                for place in range(count):
                    self._stream.copy_in(target.row(taken + place), array[place])

    @property
    def _channels(self) -> int:
        return self._bundle.geometry.channels

    def _place(self, image: Any) -> tuple[Any, tuple[float, float]]:
        """Return an image on the device, and the window of its intensities."""
        intensity = self._library.intensity
        if isinstance(image, DeviceTensor):
            looked_at: NDArray[Any] = np.empty(0, image.dtype)
            if intensity.mode == "percentile" or image.dtype.kind == "f":
                looked_at = check_image(self._fetch(image))
            return image, intensity_window(looked_at, intensity, self._pixels)
        window = intensity_window(image, intensity, self._pixels)
        dtype = image.dtype if image.dtype in DTYPES else np.dtype(np.float32)
        staged = self.workspace.room.pinned("image", image.shape, dtype)
        staged[...] = image
        raw = self.workspace.room.on_device("image", image.shape, dtype)
        self._stream.copy_in(raw, staged)
        return raw, window

    def _finish_here(self, shape: tuple[int, int], out: tuple[Any, Any]) -> tuple[list[Any], Any]:
        """Make masks and label map by the device's kernels; wait, and bring them where they go."""
        w, stream = self.workspace, self._stream
        n = w.all_logits.shape[0]
        room = w.room
        wanted = {"label map": (shape, np.uint8), "masks": ((n, *shape), np.bool_)}
        results: list[Any] = []
        downloads = []
        for (name, (size, dtype)), given in zip(wanted.items(), out, strict=True):
            if given is not None and (
                tuple(given.shape) != size or np.dtype(given.dtype) != np.dtype(dtype)
            ):
                raise InputError(
                    f"out must have shape {size} and dtype {np.dtype(dtype)}, got "
                    f"{tuple(given.shape)} and {given.dtype}."
                )
            if given is None or isinstance(given, np.ndarray):
                made = room.on_device(name, size, dtype)
                array = np.empty(size, dtype) if given is None else given
                downloads.append((array, room.pinned(name, size, dtype), made))
                results.append((made, array))
            else:
                tensor = adopt_tensor(given, self.device)
                if tensor.read_only:
                    raise InputError("out lies in memory that its owner made read-only.")
                results.append((tensor, tensor))
        (labels, label_map), (planes, masks) = results
        pixels = self._device_pixels(*shape)
        pixels.finish(w.all_logits, w.all_scores, labels, planes, stream)
        for _, staged, made in downloads:
            stream.copy_out(staged, made)
        stream.synchronize()
        for array, staged, _ in downloads:
            array[...] = staged
        each = [masks.row(i) if isinstance(masks, DeviceTensor) else masks[i] for i in range(n)]
        return each, label_map

    def _device_pixels(self, height: int, width: int) -> DevicePixels:
        size = DevicePixels.scratch_bytes(height, width)
        scratch = self.workspace.room.on_device("scratch", (size,), np.uint8)
        return DevicePixels(self._kernels, scratch)  # type: ignore[arg-type]

    def _fetch(self, tensor: DeviceTensor) -> NDArray[Any]:
        """Return a copy of a tensor on the CPU, once all that our stream waits for is done."""
        array = np.empty(tensor.shape, tensor.dtype)
        if array.size:
            self.device.enter()
            self._stream.copy_out(array, tensor)
            self._stream.synchronize()
        return array

    @staticmethod
    def _check_scores(iou: NDArray[np.float32], scores: NDArray[np.float32]) -> None:
        if not (np.isfinite(iou).all() and np.isfinite(scores).all()):
            raise EngineRunError(
                f"the engine gave IoU estimates {iou.tolist()} and object scores "
                f"{scores.tolist()}: numbers that are not finite. Use another precision or engine."
            )
