"""The model: one bundle's engines and every buffer they touch, opened once on one device.

A library that adds, any number of segmenters, streams and evaluations share one. What is now on it
is explicit: :meth:`Model.look` puts an image there and returns a :class:`View`, which is valid
until the next look. Threads take turns, first come, first served.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recallseg import __version__
from recallseg.engines import defaults
from recallseg.engines.buffer_shapes import Shapes, buffer_shapes, bytes_of
from recallseg.engines.bundle import Bundle
from recallseg.engines.composition import Composition
from recallseg.engines.device import Device
from recallseg.engines.device_engine import DeviceEngine
from recallseg.engines.engine import Engine, EngineOptions
from recallseg.engines.errors import (
    InputError,
    ModelClosedError,
)
from recallseg.engines.pixels import Pixels
from recallseg.engines.pixels.interface import window_gain
from recallseg.engines.pixels.opencv import scaled
from recallseg.engines.registry import check_choice, load_engines
from recallseg.runtime.formats.images import open_image
from recallseg.runtime.frozen import public
from recallseg.runtime.library.encoding import MEMORY_FORMATS, Encoded, Origin
from recallseg.runtime.library.exemplar import StoredMemory
from recallseg.runtime.model.buffers import Buffers
from recallseg.runtime.model.frame_memories import FrameMemories
from recallseg.runtime.model.kept_looks import Kept, KeptLooks
from recallseg.runtime.model.preprocess import Intensity, intensity_window, planes_of
from recallseg.runtime.model.turns import Turns
from recallseg.runtime.model.view import (
    CONDITIONED,
    Finished,
    Gather,
    Refine,
    Stored,
    View,
    groups,
)

__all__ = ["GpuOptions", "Model"]

ENCODING = ("embed", "encode", "memorize")
"""Graphs that make of an annotated image what a library stores."""
KEPT = ("features", "skip0", "skip1")
"""Buffers that a look fills and a question reads."""
KEEP_BYTES = 256 << 20


@public
@dataclass(frozen=True)
class GpuOptions:
    """How a model uses a GPU.

    Attributes
    ----------
    device : from :func:`recallseg.open_device`, whose stream (a caller's own, say) everything is
        queued on; None opens the first GPU.
    cuda_graphs : record each graph's work, and replay it.
    cache_bytes : most bytes of recalled memories that stay on the device; the least recently used
        ones go first.
    """

    device: Device | None = None
    cuda_graphs: bool = False
    cache_bytes: int = 256 << 20


class Model(ABC):
    """Engines and buffers of one bundle on one device. Make one with :meth:`open`.

    May be shared between threads, see :attr:`turns`. Close it, or use ``with``; whatever uses a
    closed one is told so.

    Attributes
    ----------
    bundle, engine, precision, threads, gpu : what it was opened with; ``threads`` None is all
        cores, ``gpu`` None a CPU.
    device : the GPU that it runs on; None on a CPU.
    turns : a thread that makes several calls about one image takes its turn first (``with
        model.turns:``); each call by itself does so anyway.
    """

    device: Device | None = None
    gpu: GpuOptions | None = None
    _pixels: Pixels
    _rule: Intensity

    def __init__(
        self, bundle: Bundle, engine: str, precision: str, options: EngineOptions, keep_bytes: int
    ) -> None:
        self.bundle, self.engine, self.precision = bundle, engine, precision
        self.threads = options.threads
        self.turns = Turns()
        self._options = options
        self._engines: dict[str, Engine] = {}
        self._composition = Composition(self._engines)
        self._buffers = Buffers(bundle, self._allocate)
        self._kept = KeptLooks(keep_bytes)
        self._looks = 0
        # The image that was looked at, and the intensities that become 0 and 1 if known here.
        self._seen: tuple[Any, tuple[float, float] | None] | None = None
        self._closed = False

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        engine: str = defaults.ENGINE,
        precision: str = defaults.PRECISION,
        threads: int | None = None,
        gpu: GpuOptions | None = None,
        keep_bytes: int = KEEP_BYTES,
    ) -> Model:
        """Open a model. Engines are loaded, and buffers allocated, by whoever first needs them.

        Parameters
        ----------
        bundle : an open one, a folder, or the name of one that is shipped.
        engine, precision : of :data:`ENGINES` and :data:`PRECISIONS` of
            :mod:`recallseg.engines.registry`.
        threads : CPU threads; None means all cores that this process may use.
        gpu : how an engine on a GPU uses it; None for its defaults. Engines on the CPU refuse it.
        keep_bytes : most bytes of looks that are kept, see :meth:`View.keep`.

        Raises
        ------
        InputError
            For an unknown engine or precision, threads below 1, or ``gpu`` with an engine on the
            CPU.
        EngineUnavailableError
            If the engine's library or its device is not here.
        BundleError
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        kind = check_choice(engine, precision, threads)
        if issubclass(kind, DeviceEngine):
            kind.require_library()  # before anything else that such a machine may lack as well
            from recallseg.runtime.model.device import DeviceModel

            return DeviceModel(opened, engine, precision, gpu or GpuOptions(), keep_bytes)
        if gpu is not None:
            raise InputError(
                f"engine '{engine}' runs on the CPU: leave gpu out, or choose another."
            )
        from recallseg.runtime.model.host import HostModel

        return HostModel(opened, engine, precision, EngineOptions(threads), keep_bytes)

    # Life and size

    def close(self) -> None:
        """Give engines and buffers back when the query in work has ended. Harmless if repeated."""
        if self.turns.opener.elsewhere:
            return  # they are the parent's
        with self.turns:
            if not self._closed:
                self._closed = True
                self._looks += 1
                self._seen = None
                self._settle("growth")
                self._release()
                self._engines.clear()
                self._buffers = Buffers(self.bundle, self._allocate)
                self._kept.clear()

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._closed

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs that are loaded, each by one engine."""
        return tuple(self._engines)

    def graph_digests(self, *graphs: str) -> dict[str, str]:
        """Return the digests of graphs that are loaded, as their engines tell them, by name."""
        return {graph: self._engines[graph].graph_digest for graph in graphs}

    @staticmethod
    def required_bytes(bundle: Bundle, *, n: int, k: int, masks: int = 0) -> int:
        """Return the bytes of the buffers that :meth:`reserve` will take, before any is taken.

        Beside them come the weights (the size of the graph files), what engines work in
        (:mod:`recallseg.engines.budget`), images and masks at their own size, and on a GPU the
        cache of memories.
        """
        return bytes_of(buffer_shapes(bundle.specs, bundle.geometry, n=n, k=k, masks=masks))

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all buffers now, where the model runs; without what engines hold."""

    def load(self, *graphs: str) -> None:
        """Make graphs ready to run; those that are loaded already cost nothing.

        Raises
        ------
        EngineUnavailableError, EngineRunError, BundleError, PlanError, VerificationError
            As :func:`recallseg.engines.registry.load_engines`.
        """
        with self.turns:
            self._begin_turn()
            wanted = tuple(graph for graph in graphs if graph not in self._engines)
            if wanted:
                self._engines.update(
                    load_engines(
                        self.bundle,
                        self.engine,
                        self.precision,
                        options=self._options,
                        graphs=wanted,
                    )
                )

    def reserve(
        self,
        n: int = 0,
        k: int = 0,
        *,
        masks: int = 0,
        memories: int = 0,
        memory_format: str = MEMORY_FORMATS[0],
        graphs: Sequence[str],
    ) -> None:
        """Make room for questions, and load what they need; nothing grows while one is answered.

        What is there is kept where it is large enough, so that the largest of all users counts. If
        anything grows, the view of the last look is not valid any more.

        Parameters
        ----------
        n, k : structures of one question, and most memories of each.
        masks : structures that are memorized at once.
        memories : how many stored memories there are to be recalled: on a GPU, what is recalled
            again stays there as it is stored, within :attr:`GpuOptions.cache_bytes`.
        memory_format : in which they are stored.
        graphs : which will run.

        Raises
        ------
        HostMemoryError, DeviceMemoryError
            If there is too little memory, with both figures; everything is as it was then.
        """
        with self.turns:
            self._begin_turn()
            missing = self._buffers.missing(n=n, k=k, masks=masks)
            what = f"Room for {n} structures and k = {k}" if n else f"Room for {masks} masks"
            stored = Stored(memories, memory_format)
            self._require(missing, n * k, stored, tuple(graphs), what)
            self.load(*graphs)
            if missing:
                self._looks += 1  # the buffers of the last look may go
                self._settle("growth")
                self._buffers.grow(missing)
            self._fill(missing, n * k, stored)

    # An image

    def check(self, image: Any) -> Any:
        """Return a caller's image HxW or HxWx3, see :meth:`look`, as something to look at.

        Raises
        ------
        InputError
            For what cannot be taken, see :func:`recallseg.runtime.checks.check_image`.
        """
        with self.turns:
            self._begin_turn()
            return self._check(open_image(image))

    def look(
        self, image: Any, intensity: Intensity, graphs: Sequence[str] = ("embed", "encode")
    ) -> View:
        """Put an image on the model; views of earlier ones are stale from now on.

        Parameters
        ----------
        image : HxW grey or HxWx3 RGB of any real dtype: as a path, a numpy array, a PIL image, or
            what offers DLPack (PyTorch); on a GPU also ``__cuda_array_interface__``.
        intensity : the rule from pixel values to 0..1.
        graphs : those of ``embed`` and ``encode`` that will be asked for.

        Raises
        ------
        InputError
        """
        with self.turns:
            self._begin_turn()
            checked = self._check(open_image(image))
            if not all(graph in self._engines for graph in graphs):
                self.reserve(graphs=graphs)
            self._settle("look")
            self._looks += 1
            self._seen, self._rule = (checked, None), intensity
            self._prepare(checked, intensity, graphs)
            height, width = checked.shape[:2]
            return View(self, self._looks, (height, width), graphs)

    def put(self, kept: Kept) -> View:
        """Bring a kept look back, without its image and without running a graph.

        Raises
        ------
        StaleViewError
            If it was dropped, because more were kept since than there is room for.
        InputError
            If it is another model's.
        """
        with self.turns:
            self._begin_turn()
            if kept.model is not self:
                raise InputError("this was kept by another model. Look at the image again.")
            tensors = self._kept.find(kept)
            self._settle("look")
            self._looks += 1
            self._seen = None
            for name in KEPT:
                self._copy(self._buffers[name], tensors[name])
            view = View(self, self._looks, kept.shape, ())
            view._embedding, view._encoded = kept.embedding, True
            return view

    def keeps(self, kept: Kept) -> bool:
        """Whether a kept look is still there; asking does not count as use."""
        return kept in self._kept

    def embed(self, image: Any, intensity: Intensity) -> NDArray[np.float32]:
        """Return the embedding, D of unit length, of an image HxW or HxWx3."""
        with self.turns:
            return self.look(image, intensity, ("embed",)).embedding

    def memorize(
        self, image: Any, masks: Mapping[str, NDArray[np.bool_]], intensity: Intensity
    ) -> Encoded:
        """Encode an image HxW or HxWx3 (RGB) and a boolean HxW mask for each structure.

        Returns
        -------
        Encoded
            Arrays on the host, of its own.
        """
        most = max(1, min(len(masks), self.bundle.geometry.max_n))  # none: of what it lacks
        with self.turns:
            self.reserve(masks=most, graphs=ENCODING)
            return self._encoded(self.look(image, intensity), masks)

    def lanes(self, images: int) -> tuple[Model, ...]:
        """Return models to :meth:`memorize` so many images with, at the same time.

        This one alone, where its engine gains nothing by more or the images are too few; else new
        ones of the same bundle, engine and precision, which share its threads. Close those.
        """
        return (self,)

    def memorize_kept(self, kept: Kept, masks: Mapping[str, NDArray[np.bool_]]) -> Encoded:
        """Do the same with an image that was kept, with its embedding, and is not encoded anew."""
        most = max(1, min(len(masks), self.bundle.geometry.max_n))
        with self.turns:
            self.reserve(masks=most, graphs=ENCODING)
            return self._encoded(self.put(kept), masks)

    def _encoded(self, view: View, masks: Mapping[str, NDArray[np.bool_]]) -> Encoded:
        with self.turns:
            embedding = view.embedding
            memories: dict[str, NDArray[np.float32]] = {}
            pointers: dict[str, NDArray[np.float32]] = {}
            for group in groups(list(masks), self.bundle.geometry.max_n):
                made = map(self._fetch, view.memorize([masks[name] for name in group]))
                for found, rows in zip((memories, pointers), made, strict=True):
                    found.update(zip(group, rows, strict=True))
        origin = Origin(self.engine, self.precision, self.graph_digests(*ENCODING), __version__)
        return Encoded(embedding, memories, pointers, origin)

    def frame_memories(self, structures: int, size: int) -> FrameMemories:
        """Return empty room for the memories of one sequence, where the model runs.

        Parameters
        ----------
        structures : n, how many structures a question has.
        size : most memories of each; the oldest is forgotten first.
        """
        with self.turns:
            self._begin_turn()
            g = self.bundle.geometry
            shapes = {
                "memories": (structures, size, g.tokens, g.memory_dim),
                "pointers": (structures, size, g.channels),
            }
            self._require(shapes, 0, Stored(), (), f"Memories of {size} frames")
            tensors = {name: self._allocate(shape) for name, shape in shapes.items()}
            return FrameMemories(tensors["memories"], tensors["pointers"])

    def fetch(self, array: Any) -> NDArray[Any]:
        """Return the contents of a contiguous array that lies where the model runs, on the host.

        Raises
        ------
        InputError
            If it lies elsewhere.
        """
        with self.turns:
            self._begin_turn()
            return self._fetch(self._adopted(array))

    def blank(self, arrays: Iterable[Any]) -> None:
        """Set all elements of a caller's arrays, here or where the model runs, to 0."""
        with self.turns:
            self._begin_turn()
            for array in arrays:
                if isinstance(array, np.ndarray):
                    array[...] = 0
                else:
                    self._blank(self._adopted(array))

    @abstractmethod
    def copy_frame(self, image: Any) -> Any:
        """Return a copy of a caller's frame, to look at later; it stays on the GPU if both are.

        May be called by any thread at any time. The caller may reuse its memory afterwards.

        Parameters
        ----------
        image : a numpy array; anything with ``__cuda_array_interface__`` (CuPy, PyTorch, Numba,
            PyCUDA) or ``__dlpack__`` that lies contiguously on the GPU; anything with
            ``__dlpack__`` on the CPU.

        Raises
        ------
        InputError
            For anything else.
        EngineUnavailableError
            If it says that it lies on a GPU, and there is no driver.
        """

    # What a place does in its own way

    @abstractmethod
    def _adopted(self, array: Any) -> Any:
        """Return a caller's array as a tensor of this place."""

    @abstractmethod
    def _blank(self, tensor: Any) -> None:
        """Set a tensor to 0, and wait for it."""

    @abstractmethod
    def _allocate(self, shape: tuple[int, ...]) -> Any:
        """Return a new float32 tensor."""

    @abstractmethod
    def _copy(self, target: Any, source: Any) -> None:
        """Copy, or queue the copy of, one tensor to another of the same size."""

    @abstractmethod
    def _write(self, target: Any, array: NDArray[np.float32]) -> None:
        """Copy from the host to a tensor of the same shape, and wait for it."""

    @abstractmethod
    def _place_prompts(self, prompts: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Return what a person said where the model runs."""

    @abstractmethod
    def _fetch(self, tensor: Any) -> NDArray[Any]:
        """Return a tensor's contents on the host, in an array of its own."""

    @abstractmethod
    def _require(
        self, shapes: Shapes, recalled: int, stored: Stored, graphs: Sequence[str], what: str
    ) -> None:
        """Raise if there is too little memory for these buffers, memories and graphs."""

    @abstractmethod
    def _fill(self, names: Shapes, recalled: int, stored: Stored) -> None:
        """Write what new buffers must hold, and make room for stored memories."""

    @abstractmethod
    def _check(self, image: Any) -> Any: ...

    @abstractmethod
    def _prepare(self, image: Any, intensity: Intensity, graphs: Sequence[str]) -> None:
        """Make the inputs of graphs."""

    @abstractmethod
    def _embed(self, encode: bool) -> tuple[NDArray[np.float32], bool]:
        """Return the embedding on the host, and whether ``encode``, which is wanted, ran too."""

    @abstractmethod
    def _recall(
        self, gather: Gather, memories: Sequence[Sequence[StoredMemory]], tokens: Any, pointers: Any
    ) -> None:
        """Bring each structure's memories of exemplars to its first rows of tensors.

        ``tokens`` nxkxTx64, ``pointers`` nxkxC.
        """

    @abstractmethod
    def _leave_out(self, rows: Sequence[int]) -> None:
        """Give rows of all logits, IoU estimates and scores what absent structures have."""

    @abstractmethod
    def _finish(
        self, n: int, of: int, shape: tuple[int, int], out: tuple[Any, Any], refine: Refine | None
    ) -> tuple[Callable[[], Finished], NDArray[np.float32] | None]:
        """Make masks of the first n of so many structures; return what waits for them.

        And the logits nxHxW that they are made of where those were refined, in a buffer that the
        next question writes over.
        """

    def _refined(
        self, refine: Refine, logits: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], list[bool]]:
        """Return what ``refine`` makes of the image and all logits, here."""
        if self._seen is None:
            raise InputError(
                "a view that was put back has no image to refine at. Look at the image again."
            )
        image, window = self._seen
        image = image if isinstance(image, np.ndarray) else self._fetch(image)
        if window is None:
            window = intensity_window(image, self._rule, self._pixels)
        values = scaled(image, np.float32(window[0]), window_gain(*window))
        return refine(planes_of(values), logits)

    @abstractmethod
    def _masks(self, n: int) -> NDArray[np.float32]:
        """Return where to write masks nx1xSxS for :meth:`_memorize`."""

    @abstractmethod
    def _memorize(self, masks: NDArray[np.float32]) -> None:
        """Run ``memorize`` on masks that were written where :meth:`_masks` said."""

    def _begin_turn(self) -> None:
        """Do what each call begins with."""
        if self._closed:
            raise ModelClosedError(
                f"the model of bundle '{self.bundle.name}' on {self.engine} has been closed. Open "
                "it again, and make what used it anew."
            )

    @abstractmethod
    def _settle(self, beginning: Literal["look", "question", "growth"]) -> None:
        """Wait until nothing that was queued before reads or writes what this changes."""

    @abstractmethod
    def _release(self) -> None:
        """Give back what is beside engines and buffers."""

    def _run(self, graph: str, n: int = 1, k: int = 1) -> None:
        self._composition.run(graph, self._buffers.of(graph, n, k))

    def _kept_shapes(self, structures: int | None = None) -> dict[str, tuple[int, ...]]:
        outputs = {tensor.name: tensor for tensor in self.bundle.specs["encode"].outputs}
        shapes = {name: outputs[name].resolve() for name in KEPT}
        if structures is not None:  # and those of one of which nothing is recalled
            shapes[CONDITIONED] = (structures + 1, *shapes["features"][1:])
        return shapes

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{', '.join(self.graphs) or 'nothing'} loaded"
        return (
            f"recallseg.Model({self.bundle.name}, {self.engine} {self.precision}; {state}, "
            f"{self.nbytes / 2**20:.0f} MiB)"
        )
