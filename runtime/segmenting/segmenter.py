"""Image in, masks out: the segmenter as its users see it; the work lies in the modules it calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines import defaults
from recallseg.engines.device import Device
from recallseg.engines.errors import InputError, StaleViewError
from recallseg.engines.precisions import find_precision
from recallseg.runtime.checks import check_count, check_number
from recallseg.runtime.formats.images import open_image
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.library import Library
from recallseg.runtime.model.frame_memories import FrameMemories
from recallseg.runtime.model.model import GpuOptions, Model
from recallseg.runtime.segmenting.acquisition import Acquisition
from recallseg.runtime.segmenting.batches import check_room
from recallseg.runtime.segmenting.calibrating import calibrate
from recallseg.runtime.segmenting.calibration import Thresholds
from recallseg.runtime.segmenting.in_flight import InFlight
from recallseg.runtime.segmenting.question import Question
from recallseg.runtime.segmenting.reach import REACH, nearest
from recallseg.runtime.segmenting.recipe import Provenance, Recipe
from recallseg.runtime.segmenting.refining import find_head
from recallseg.runtime.segmenting.result import HeadUse, Result
from recallseg.runtime.segmenting.standing import Standings
from recallseg.runtime.segmenting.structures import check_structures
from recallseg.runtime.segmenting.timings import Timings

if TYPE_CHECKING:
    from recallseg.runtime.segmenting.corrections import Corrections

__all__ = ["Segmenter"]

Progress = Callable[[int, int], None]


class Segmenter:
    """Segments images by recalling a library's exemplars.

    Everything is allocated here, and nothing in a query. Engines and buffers are those of a model,
    which a library and all its segmenters share; calls from several threads take turns on it, first
    come, first served. Close it, or use ``with``: it closes the library if it opened that.

    Parameters
    ----------
    library : a :class:`Library` or its folder.
    k : exemplars to recall for each structure at most: all, where fewer show it.
    structures : what to segment, in the order of the label values; None means all that exemplars
        with these ``tags`` show.
    engine, precision, threads : see :meth:`recallseg.Model.open`; None for what the library was
        opened with. A model that is open with these is shared, otherwise one is opened.
    tags : recall only exemplars that carry all of these tags.
    refine : let the library's head, if it has one, draw boundaries at the image's own resolution;
        False leaves it out. See :meth:`recallseg.Library.fit`.
    reach : of the k, recall only those at most this many times as far as the nearest (1 or more);
        ``math.inf`` recalls k whatever their distance, so that every query takes the same time.
    frames : most frame memories, of earlier frames, that a query of a sequence takes beside its k
        exemplars, see :meth:`frame_memories`.
    gpu : how engines on a GPU use it; None for its defaults. Engines on the CPU refuse it.
    model : an open one, instead; it is not closed here.

    Attributes
    ----------
    model : what it runs on.
    refining : the head at work; None without one.

    Raises
    ------
    InputError
        For an unknown structure, k = 0 or more than the bundle allows, a reach below 1, tags that
        no exemplar carries, an unknown engine or precision, or a model that is not what is asked
        for beside it.
    LibraryMismatchError
        If the model is of another bundle than the library.
    HostMemoryError, DeviceMemoryError
        If there is too little memory; whatever shares the model goes on as before.
    EngineUnavailableError, EngineRunError, BundleError, LibraryError
    """

    def __init__(
        self,
        library: Library | str | Path,
        *,
        k: int = defaults.K,
        structures: Sequence[str] | None = None,
        engine: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        tags: Mapping[str, str] | None = None,
        reach: float = REACH,
        frames: int = 0,
        refine: bool = True,
        gpu: GpuOptions | None = None,
        model: Model | None = None,
    ) -> None:
        self._opened = not isinstance(library, Library)
        self.library = library if isinstance(library, Library) else Library.open(library)
        if model is not None:
            self.library.accept(model, engine, precision, threads, gpu)
        self.bundle = self.library.bundle
        most = self.bundle.geometry.max_k
        self.k = check_count(k, "k", 1, most)
        beside = f"memories of earlier frames beside k = {self.k}"
        self.frames = check_count(frames, beside, 0, most - self.k)
        self.reach = check_number(reach, "reach", 1, " (times the nearest distance)")
        self.tags = FrozenMap(self.library.conceal(tags))
        self.structures = check_structures(self.library, structures, self.tags)
        self.model = model or self.library.model(engine, precision, threads, gpu)
        self.engine, self.precision = self.model.engine, self.model.precision
        self.refining, head = (
            find_head(self.library, self.structures, self.model.threads) if refine else (None, None)
        )
        self.recipe = Recipe(
            self.bundle.identity,
            self.engine,
            self.precision,
            self.library.memory_format,
            self.k,
            self.reach,
            self.tags,
            self.library.intensity.to_json(),
            find_precision(self.precision).approximations,
            self.refining is not None,
        )
        fitted = None if self.refining is None else self.refining.head
        self._question = question = Question(
            self.library,
            self.model,
            self.recipe,
            self.structures,
            frames=self.frames,
            refining=self.refining,
            standings=Standings(self.library, self.recipe, self.structures, fitted, head),
        )
        self.labels = question.labels
        self.model.reserve(
            **question.size,
            memories=sum(self.library.count(name) for name in question.every),
            memory_format=self.library.memory_format,
            graphs=question.graphs,
        )
        self._flying = InFlight(self)

    @property
    def device(self) -> Device | None:
        """The GPU that it runs on; None on a CPU."""
        return self.model.device

    @property
    def head(self) -> HeadUse | None:
        """What the library's head has to do with results; None if it has none, or is left out."""
        return self._question.standings.head

    @property
    def provenance(self) -> Provenance:
        """What makes results now; that of a result, until the library is changed."""
        return self._question.provenance

    @property
    def required_bytes(self) -> int:
        """Bytes of the model's buffers that its queries need, see :meth:`Model.required_bytes`."""
        return Model.required_bytes(self.bundle, **self._question.size)

    def close(self) -> None:
        """Wait for what is in flight, and close the library if it was opened here.

        The model goes when nothing uses it.
        """
        self._flying.close()
        if self._opened:
            self.library.close()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def segment(
        self,
        image: Any,
        *,
        deadline_ms: float | None = None,
        out: tuple[Any, Any] = (None, None),
        frame_memories: FrameMemories | None = None,
        acquisition: Acquisition | None = None,
        without: Collection[str] = (),
        cancelled: Callable[[], bool] | None = None,
        keep_logits: bool = False,
    ) -> Result:
        """Segment one image.

        Parameters
        ----------
        image : HxW grey or HxWx3 RGB, integer or floating, any size: a path, a numpy array, a PIL
            image, or what offers DLPack on the CPU, e.g. a PyTorch tensor. An engine on a GPU also
            takes a contiguous array that lies there (``__cuda_array_interface__`` or DLPack).
        deadline_ms : most milliseconds from this call to the result, waiting for other threads
            included; None for no limit. Looked at between stages.
        out : a label map (uint8 HxW) and masks (bool nxHxW) to write into; None for new ones. With
            an engine on a GPU and its pixel kernels, arrays that lie there stay there.
        frame_memories : of the frames before, made by :meth:`frame_memories`. They are used
            beside the recalled ones, and what this image shows is added; structures that are
            absent or suspect are not.
        acquisition : what is known of its scale and side; recalled exemplars of another scale, or
            of the other side, then are a reason to look.
        without : keys of exemplars that are passed over, e.g. of the patient whose image it is.
        cancelled : asked between stages; True ends the query.
        keep_logits : copy the logits into the result, so that its probabilities can be asked for
            after other images, and are pickled with it; see :attr:`Result.logits`.

        Returns
        -------
        Result
            Masks on the image's own grid; its arrays are those of ``out``, or new.

        Raises
        ------
        InputError
            For another shape or dtype, an empty image, NaN or infinite pixels, or frame
            memories of another segmenter.
        EngineRunError
            If an engine fails.
        ModelClosedError
            If the model has been closed.
        DeadlineError
            If it took too long.
        CancelledError
            If ``cancelled`` said so; ``out`` may be half written.
        """
        return self._prepare(
            deadline_ms=deadline_ms,
            cancelled=cancelled,
            out=out,
            frame_memories=frame_memories,
            acquisition=acquisition,
            without=without,
            keep_logits=keep_logits,
        )(open_image(image))()  # files are read before the turn on the model that others wait for

    def segment_async(self, image: Any, **options: Any) -> Future[Result]:
        """Hand in an image, and get its result later: the next one can be handed in meanwhile.

        On a GPU several in flight keep it at work while results are taken and images are read; on a
        CPU they wait for each other. Queries of one segmenter begin and end in the order in which
        they were handed in, beside calls of other threads, which take turns with them as ever.
        :data:`MOST_IN_FLIGHT` may be in flight: this call waits until one of them has ended before
        it takes another.

        Parameters
        ----------
        image : as for :meth:`segment`. A copy is taken: the caller may reuse its memory.
        options : those of :meth:`segment`, with the same meaning. ``deadline_ms`` counts from this
            call. Arrays of ``out`` are the query's until its result is there, each its own; of
            ``frame_memories`` every query sees those of the one before. Probabilities of any but
            the last need ``keep_logits``.

        Returns
        -------
        concurrent.futures.Future
            The very result of :meth:`segment`, or what that raises, unusable images included.
            ``cancel()`` drops a query that waits; one that has begun ends at the next stage if its
            ``cancelled`` says so.

        Raises
        ------
        InputError
            If the segmenter has been closed.
        """
        return self._flying.hand_in(image, options)

    def segment_many(
        self,
        images: Iterable[Any],
        *,
        keep_logits: bool = False,
        progress: Progress | None = None,
    ) -> list[Result]:
        """Segment a list of images, one after the other: all of them, or none.

        A method of its own, so that :meth:`segment` always returns one result. All are looked at
        first: a file is read, checked and let go, and read again when its turn comes, so that a
        list of paths needs the memory of one image; and all results must fit into memory, masks
        and label maps of ``(n + 1) x HxW`` bytes each. So one that cannot be used, or too many, are
        told before any is done. The graphs take one image at a time, and other threads have their
        turns in between.

        Parameters
        ----------
        images : each as for :meth:`segment`.
        keep_logits : as for :meth:`segment`; without, only the last result has probabilities.
        progress : is told how many are done, of how many.

        Returns
        -------
        list
            A result for each, in their order.

        Raises
        ------
        InputError
            If an image cannot be used, with its position in the list, counted from 0; no result is
            given then.
        HostMemoryError
            If the results would not fit into the memory that is free, before any is made.
        EngineRunError, ModelClosedError
        """
        if isinstance(images, (str, bytes, PathLike, Mapping)) or hasattr(images, "ndim"):
            raise InputError(
                f"images must be a list of images, got one {type(images).__name__}. Use "
                "segment(image), or put it into a list."
            )
        images = [*images]
        shapes: list[tuple[int, int]] = []
        for position, image in enumerate(images):
            with _at(position):
                shapes.append(self.model.check(open_image(image)).shape[:2])
        check_room(self, shapes, keep_logits)
        results = []
        for position, image in enumerate(images):
            with _at(position):
                results.append(self.segment(image, keep_logits=keep_logits))
            if progress is not None:
                progress(len(results), len(images))
        return results

    def correct(
        self,
        image: Any,
        *,
        without: Collection[str] = (),
        acquisition: Acquisition | None = None,
    ) -> Corrections:
        """Segment an image, and return what a person corrects the result with.

        Parameters
        ----------
        image, without, acquisition : see :meth:`segment`.

        Raises
        ------
        BundleError
            If the bundle has no graph ``correct``.
        InputError, EngineRunError, ModelClosedError
        """
        from recallseg.runtime.segmenting.corrections import Corrections

        return Corrections(
            self.library, image, segmenter=self, without=without, acquisition=acquisition
        )

    def frame_memories(self) -> FrameMemories:
        """Return room for the memories of one sequence of frames or slices, empty.

        Raises
        ------
        InputError
            If the segmenter was made with ``frames=0``.
        """
        if not self.frames:
            raise InputError(
                "this segmenter has no room for memories of earlier frames: make it with "
                "Segmenter(..., frames=3), say."
            )
        return self.model.frame_memories(len(self.structures), self.frames)

    def distance(self, image: Any) -> float:
        """Return the cosine distance (0..2) to the nearest exemplar that shows a structure.

        Costs an embedding and a search. ``image`` and what is raised: see :meth:`segment`.
        """
        embedding = self.model.embed(open_image(image), self.library.intensity)
        recalled = self.library.recall(embedding, self.structures, 1, tags=self.tags)
        return min(nearest(found.matches) for found in recalled.found.values())

    def logits(self) -> NDArray[np.float32]:
        """Return the mask logits of the last query, nx(S/4)x(S/4); NaN where none were made.

        Raises
        ------
        StaleViewError
            If there was no query yet, or the model has seen another image since.
        """
        view = self._question.view
        if view is None:
            raise StaleViewError("there was no query yet. Segment an image first.")
        return view.logits()

    def logits_of(
        self, image: Any, without: Sequence[Collection[str]] = ((),)
    ) -> list[tuple[Result, NDArray[np.float32]]]:
        """Segment an image, without each of some sets of exemplars in turn.

        Returns what memory attention made of it too, see :meth:`logits`. The image is encoded once.
        """
        with self.model.turns:
            found, view = [], None
            for keys in without:
                result = self._question.ask(image, Timings(), without=keys, view=view)
                view = self._question.view
                found.append((result, self.logits()))
            return found

    def warm_up(self, runs: int = 2) -> None:
        """Run on a blank image, so that the first real query is as fast as the next.

        On a GPU a query is prepared, or recorded, for each number of memories that may come, also
        for those that the library has no exemplars for yet.
        """
        runs = check_count(runs, "runs", 1)
        side = self.bundle.geometry.image_size
        blank = np.zeros((side, side), np.uint8)
        every = self.device is not None and self.reach < math.inf
        for exemplars in range(1 if every else self.k, self.k + 1):
            for _ in range(runs):
                self._question.ask(blank, Timings(), exemplars=exemplars)

    def calibrate(self, progress: Progress | None = None) -> Mapping[str, Thresholds]:
        """Segment every exemplar from those of other groups, and store what is normal.

        A group is what :meth:`Library.add` or an import was told (patient, series, volume); with
        none, each exemplar stands by itself, and of one patient's there are up to six blocks, as
        for :meth:`Library.fit`. With a head its own groups are left out.
        It holds for this segmenter's recipe and structures; what is stored for others is kept.
        Costs one query for each exemplar that shows one of the structures and carries the tags.
        Exemplars that are added later leave it in force, see
        :func:`recallseg.runtime.segmenting.calibration.in_force`.

        Parameters
        ----------
        progress : is told how many are done, of how many.

        Returns
        -------
        Mapping
            Thresholds by structure, which say what was left out at a time. With fewer than four
            exemplars left out in turn there is none for the IoU estimate, and the structure counts
            as uncalibrated.

        Raises
        ------
        InputError
            If the library did not keep its images, or no structure has two exemplars.
        LibraryWriteError
            If the library is open for reading only or cannot be written.
        LibraryCorruptError
            If a stored image is damaged.
        EngineRunError
            If an engine fails.
        """
        return calibrate(self._question, progress)

    def _prepare(
        self,
        *,
        deadline_ms: float | None = None,
        cancelled: Callable[[], bool] | None = None,
        frame_memories: FrameMemories | None = None,
        out: tuple[Any, Any] = (None, None),
        acquisition: Acquisition | None = None,
        without: Collection[str] = (),
        keep_logits: bool = False,
    ) -> Callable[[Any], Callable[[], Result]]:
        """Check what is asked of an image, from now on; return what begins it.

        Options are those of :meth:`segment`.
        """
        if deadline_ms is not None:
            check_number(deadline_ms, "deadline_ms", 0, " ms, or None for no limit")
        timings = Timings(deadline_ms, cancelled)
        if frame_memories is not None:
            self._check_frame_memories(frame_memories)
        return partial(
            self._question.begin,
            timings=timings,
            out=out,
            frame_memories=frame_memories,
            acquisition=acquisition,
            without=without,
            keep_logits=keep_logits,
        )

    def _check_frame_memories(self, frame_memories: FrameMemories) -> None:
        wanted = (len(self.structures), self.frames)
        if (frame_memories.structures, frame_memories.size) != wanted:
            raise InputError(
                f"these frame memories are for {frame_memories.structures} structures and "
                f"{frame_memories.size} frames, the segmenter has {wanted[0]} and {wanted[1]}. "
                "Use those that its own frame_memories() makes."
            )

    def __repr__(self) -> str:
        return (
            f"recallseg.Segmenter({', '.join(self.structures)}; k={self.k}, {self.engine} "
            f"{self.precision}, buffers {self.required_bytes / 2**20:.0f} MiB)"
        )


@contextmanager
def _at(position: int) -> Iterator[None]:
    """Say of an InputError at which position of a list of images it arose."""
    try:
        yield
    except InputError as error:
        raise InputError(f"images[{position}]: {error}") from error
