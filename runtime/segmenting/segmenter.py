"""Image in, masks out: the composition of preprocessing, search, engines and postprocessing."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recallseg import __version__
from recallseg.engines import defaults
from recallseg.engines.device import Device
from recallseg.engines.errors import InputError, StaleViewError
from recallseg.engines.operators import operators_digest
from recallseg.engines.precisions import find_precision
from recallseg.engines.verification import mask_dice
from recallseg.runtime.checks import check_count, check_number
from recallseg.runtime.formats.images import open_image
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.library import Library
from recallseg.runtime.library.exemplar import Match, Recollection, StoredMemory
from recallseg.runtime.model.frame_memories import FrameMemories
from recallseg.runtime.model.model import GpuOptions, Model
from recallseg.runtime.model.view import Refine, View, Wanted, groups
from recallseg.runtime.segmenting.acquisition import Acquisition
from recallseg.runtime.segmenting.batches import check_room
from recallseg.runtime.segmenting.calibration import (
    InForce,
    Thresholds,
    conformal_upper,
    in_force,
)
from recallseg.runtime.segmenting.in_flight import InFlight
from recallseg.runtime.segmenting.presence import (
    LEAST_SHARE,
    presence_share,
)
from recallseg.runtime.segmenting.probabilities import LogitsOnModel
from recallseg.runtime.segmenting.reach import REACH, within_reach
from recallseg.runtime.segmenting.recipe import Provenance, Recipe
from recallseg.runtime.segmenting.refining import describe_head, find_head, mend_head
from recallseg.runtime.segmenting.result import Result, Score
from recallseg.runtime.segmenting.standing import Standing, differing_from
from recallseg.runtime.segmenting.timings import Timings

if TYPE_CHECKING:
    from recallseg.runtime.segmenting.corrections import Corrections, Keeper

__all__ = ["Segmenter"]

MOST_STRUCTURES = 255  # values of an 8-bit label map, 0 being background

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
    head : what the library's head has to do with results; None if it has none, or is left out.

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
        self.structures = self._check_structures(structures)
        self.labels = FrozenMap({name: i + 1 for i, name in enumerate(self.structures)})
        self.model = model or self.library.model(engine, precision, threads, gpu)
        self.engine, self.precision = self.model.engine, self.model.precision
        self.refining, self.head = (
            find_head(self.library, self.structures, self.model.threads) if refine else (None, None)
        )
        self.model.reserve(
            **self._size,
            memories=sum(self.library.count(name) for name in self._every),
            memory_format=self.library.memory_format,
            graphs=self._graphs,
        )
        self._flying = InFlight(self)
        self._view: View | None = None
        self._made: Provenance | None = None  # of the last result: few results change it
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
        self._recipes = self.recipe.digests(self.bundle.former_identities)
        self._limits_now: dict[str, InForce] = {}
        self._limits_of: Any = None
        self._commits: Any = None
        self._mend_now = ""

    @property
    def device(self) -> Device | None:
        """The GPU that it runs on; None on a CPU."""
        return self.model.device

    @property
    def required_bytes(self) -> int:
        """Bytes of the model's buffers that its queries need, see :meth:`Model.required_bytes`."""
        return Model.required_bytes(self.bundle, **self._size)

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
        return min(_nearest(found.matches) for found in recalled.found.values())

    def logits(self) -> NDArray[np.float32]:
        """Return the mask logits of the last query, nx(S/4)x(S/4); NaN where none were made.

        Raises
        ------
        StaleViewError
            If there was no query yet, or the model has seen another image since.
        """
        if self._view is None:
            raise StaleViewError("there was no query yet. Segment an image first.")
        return self._view.logits()

    def logits_of(
        self, image: Any, without: Sequence[Collection[str]] = ((),)
    ) -> list[tuple[Result, NDArray[np.float32]]]:
        """Segment an image, without each of some sets of exemplars in turn.

        Returns what memory attention made of it too, see :meth:`logits`. The image is encoded once.
        """
        with self.model.turns:
            found, view = [], None
            for keys in without:
                result = self._segment(image, Timings(), without=keys, view=view)
                view = self._view
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
                self._segment(blank, Timings(), exemplars=exemplars)

    def calibrate(self, progress: Progress | None = None) -> Mapping[str, Thresholds]:
        """Segment every exemplar from the others, and store what is normal in the library.

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
            Thresholds by structure. With fewer than four exemplars left out in turn there is none
            for the IoU estimate, and the structure counts as uncalibrated.

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
        self.library.check_writable("calibrate")
        if not self.library.keeps_sources:
            raise InputError(
                f"the library {self.library.path} did not keep its images, so none can be left out "
                "and segmented from the others. Make a new library that keeps them."
            )
        exemplars = [
            exemplar
            for exemplar in self.library
            if self.tags.items() <= exemplar.tags.items()
            and any(name in exemplar.structures for name in self.structures)
        ]
        if len(exemplars) < 2:
            raise InputError(
                f"calibrating leaves out one exemplar at a time, and there is {len(exemplars)} of "
                f"{', '.join(self.structures)}. Annotate more; four of a structure are needed to "
                "say what is normal."
            )
        iou: dict[str, list[float]] = {name: [] for name in self.structures}
        dice: dict[str, list[float]] = {name: [] for name in self.structures}
        for done, exemplar in enumerate(exemplars):
            image, masks = self.library.source(exemplar.key)
            result = self._segment(image, Timings(), without=self._belonging(exemplar.key))
            for name in self.structures:
                if name in masks and result.scores[name].present:
                    iou[name].append(result.scores[name].iou)
                    dice[name].append(mask_dice(result.masks[name], masks[name]))
            if progress is not None:
                progress(done + 1, len(exemplars))
        thresholds = {}
        for name, limits in self._limits().items():
            upper = conformal_upper([-value for value in iou[name]])
            thresholds[name] = Thresholds(
                distance=limits.thresholds.distance,
                iou=None if upper is None else -upper,
                exemplars=len(iou[name]),
                dice=float(np.median(dice[name])) if dice[name] else None,
            )
        made = result.provenance.to_json()
        self.library.store_calibrations(
            self.recipe.digest,
            {
                name: {"thresholds": found.to_json(), "provenance": made}
                for name, found in thresholds.items()
            },
            exemplars[-1].key,
        )
        return FrozenMap(thresholds)

    def _belonging(self, key: str) -> tuple[str, ...]:
        """Return an exemplar's key, and with a head those of its group, which it must not see."""
        return (key,) if self.refining is None else self.refining.group(self.library, key)

    def _refine(self, without: Collection[str]) -> Refine | None:
        """Return what draws boundaries, by units that have not seen what is passed over."""
        if self.refining is None:
            return None
        return self.refining.refining(self.library, self._every, without)

    @property
    def _every(self) -> tuple[str, ...]:
        """What is asked of the model: the structures, and others that the head looks at."""
        if self.refining is None:
            return self.structures
        beside = (n for n in self.refining.head.structures if n not in self.structures)
        return (*self.structures, *beside)

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
        """Check what is asked of an image, from now on; return what begins it, see :meth:`_begin`.

        Options are those of :meth:`segment`.
        """
        if deadline_ms is not None:
            check_number(deadline_ms, "deadline_ms", 0, " ms, or None for no limit")
        timings = Timings(deadline_ms, cancelled)
        if frame_memories is not None:
            self._check_frame_memories(frame_memories)
        return partial(
            self._begin,
            timings=timings,
            out=out,
            frame_memories=frame_memories,
            acquisition=acquisition,
            without=without,
            keep_logits=keep_logits,
        )

    def _segment(self, image: Any, timings: Timings, **options: Any) -> Result:
        """Run a query; options as :meth:`_queue` has them."""
        return self._begin(image, timings, **options)()

    def _begin(self, image: Any, timings: Timings, **options: Any) -> Callable[[], Result]:
        """Take a turn and queue a query; return what waits for its result, and needs no turn."""
        with timings.locked(self.model.turns):
            return self._queue(image, timings, **options)

    def _queue(
        self,
        image: Any,
        timings: Timings,
        *,
        without: Collection[str] = (),
        out: tuple[Any, Any] = (None, None),
        frame_memories: FrameMemories | None = None,
        exemplars: int | None = None,
        acquisition: Acquisition | None = None,
        keeper: Keeper | None = None,
        keep_logits: bool = False,
        view: View | None = None,
    ) -> Callable[[], Result]:
        """Do all of a query but waiting for its result; return what does that, to be called once.

        It runs without the exemplars of the keys ``without``. With ``exemplars`` it recalls exactly
        so many, some of them repeatedly, to warm up; a ``keeper`` keeps what the answer can be
        corrected with; a ``view`` is of the image, which is on the model already.
        """
        n = len(self.structures)
        earlier = [
            0 if frame_memories is None or i >= n else frame_memories.count(i)
            for i in range(len(self._every))
        ]
        with timings("prepare"):
            self._view = view = view or self.model.look(image, self.library.intensity)
            view.begin(len(self._every))
        with timings("embed"):
            embedding = view.embedding
        with timings("search"):
            recollection = self.library.recall(
                embedding, self._every, self.k, tags=self.tags, without=without
            )
            recalled = {
                name: within_reach(found.matches, self.reach)
                for name, found in recollection.found.items()
            }
            memories = self._memories(recollection, recalled, exemplars)
            recalled = {name: recalled[name] for name in self.structures}
        with timings("encode"):
            view.encode()
            if keeper is not None:
                keeper.begin(view, len(self._every))
        for k, members in self._groups(memories, earlier):
            with timings("gather"):
                wanted = [Wanted(i, memories[i]) for i in members]
                view.recall(self.library.gather, wanted, k, frame_memories)
            with timings("attend"):
                view.attend()
                if keeper is not None:
                    keeper.attended(view)
            with timings("decode"):
                view.decode()
        with timings("finish"):
            wait = view.finish_later(out, n=n, refine=self._refine(without))
        # What is known without the result is found while the device makes it.
        standing = self._stand()
        differing = differing_from(self.library, acquisition, view.shape, recalled)
        provenance = self._provenance(recollection)
        logits: Mapping[str, NDArray[np.float32]] = LogitsOnModel(view, self.structures)
        if keeper is not None:
            keeper.logits = view.logits()[:n]
        if keep_logits:
            logits = FrozenMap(logits)

        def conclude() -> Result:
            with timings("finish"):
                masks, label_map, iou, object_score, small = wait()
            present = [bool(object_score[i] > 0) and not small[i] for i in range(n)]
            scores = {
                name: Score(
                    float(iou[i]),
                    float(object_score[i]),
                    _nearest(recalled[name]),
                    presence_share(recalled[name]),
                    present[i],
                )
                for i, name in enumerate(self.structures)
            }
            available = {name: recollection.found[name].available for name in self.structures}
            left = {name for name, few in zip(self.structures, small, strict=True) if few}
            quality = standing.judge(scores, recalled, available, differing, left)
            if frame_memories is not None:
                with timings("memorize"):
                    trusted = {
                        i: masks[i]
                        for i, name in enumerate(self.structures)
                        if present[i] and name not in quality.reasons
                    }
                    view.remember(frame_memories, trusted)
            return Result(
                masks=FrozenMap(dict(zip(self.structures, masks, strict=True))),
                label_map=label_map,
                labels=self.labels,
                scores=FrozenMap(scores),
                recalled=FrozenMap(recalled),
                timings=timings.finished(),
                quality=quality,
                available=FrozenMap(available),
                provenance=provenance,
                frame_memories=FrozenMap(dict(zip(self.structures, earlier[:n], strict=True))),
                notice=self.bundle.notice,
                spacing=None if acquisition is None else acquisition.spacing,
                logits=logits,
            )

        if frame_memories is None:
            return conclude
        result = conclude()  # its masks are memorized before another image is looked at
        return lambda: result

    @property
    def _operators(self) -> str | None:
        if find_precision(self.precision).native:
            return operators_digest()
        return None if self.refining is None else self.refining.operators

    @property
    def provenance(self) -> Provenance:
        """What makes results now; that of a result, until the library is changed."""
        return self._provenance(Recollection(self.library.digest, self.library.origins, {}))

    def _provenance(self, recollection: Recollection) -> Provenance:
        made, operators = self._made, self._operators
        found = recollection.digest, recollection.origins, operators
        if made is None or (made.library_digest, made.memories, made.operators) != found:
            self._made = made = Provenance(
                self.recipe,
                recollection.digest,
                recollection.origins,
                self.structures,
                self.model.graph_digests(*self._graphs)
                | ({} if self.refining is None else {"refine": self.refining.graph}),
                self.frames,
                None if self.refining is None else self.refining.head.digest,
                __version__,
                operators,
            )
        return made

    def _memories(
        self,
        recollection: Recollection,
        recalled: Mapping[str, tuple[Match, ...]],
        exemplars: int | None,
    ) -> list[list[StoredMemory]]:
        """Return the memories to attend to, by position of the structure.

        An empty list for a structure that is absent by the evidence of the nearest exemplars.
        """
        memories: list[list[StoredMemory]] = []
        for name, matches in recalled.items():
            known = recollection.found[name].memories
            if exemplars is not None:
                memories.append([*islice(cycle(known.values()), exemplars)])
            elif presence_share(matches) >= LEAST_SHARE:
                memories.append([known[match.key] for match in matches if not match.absent])
            else:
                memories.append([])
        return memories

    def _groups(
        self, memories: Sequence[Sequence[StoredMemory]], earlier: Sequence[int]
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield (memories, structures by position): those with equal counts share a call.

        ``earlier`` are the frame memories of each structure. One without a memory of an exemplar
        is left out.
        """
        by_count: dict[int, list[int]] = {}
        for index, own in enumerate(memories):
            if own:
                by_count.setdefault(len(own) + earlier[index], []).append(index)
        for count, members in sorted(by_count.items()):
            for group in groups(members, self.bundle.geometry.max_n):
                yield count, [*group]

    def _stand(self) -> Standing:
        """Return what holds for the library now."""
        limits = self._limits()
        whole = all(found.calibrated is not None for found in limits.values())
        self._mend_now = self._mend_now or ("" if whole else self._mend(limits))
        mend = "; ".join(filter(None, [self._mend_now, mend_head(self.library, self.head)]))
        return Standing(limits, mend, self.head)

    def _limits(self) -> Mapping[str, InForce]:
        """Return what holds for the library, and its calibrations, as they are now."""
        commits = self.library.commits
        if self._commits == commits:
            return self._limits_now
        state = self.library.digest, self.library.calibration_marks(self._recipes)
        if self._limits_of != state:
            learnt = self.library.learnt(self._recipes, self.structures, self.tags)
            self._limits_now = {name: in_force(found) for name, found in learnt.items()}
            self._limits_of = state
        if self.refining is not None:
            self.head = describe_head(self.library, self.refining.head, self.structures)
        self._commits, self._mend_now = commits, ""
        return self._limits_now

    def _mend(self, limits: Mapping[str, InForce]) -> str:
        """Say what is not calibrated, why, and the command that calibrates it."""
        missing = {name: one.missing for name, one in limits.items() if one.calibrated is None}
        whys = [f"'{name}': {why}" for name, why in missing.items() if why]
        if not whys and self.library.has_former_calibration:
            whys = ["what an older RecallSeg stored does not say for which settings it holds"]
        because = f" ({'; '.join(whys)})" if whys else ""
        command = [
            *("recallseg", "library", "calibrate", str(self.library.path), "--k", str(self.k)),
            *("--reach", f"{self.reach:g}", "--structures", ",".join(missing)),
            *("--engine", self.engine, "--precision", self.precision),
            *(f"--tag={name}={value}" for name, value in self.tags.items()),
        ]
        return (
            f"{', '.join(missing)} not calibrated for these settings"
            f"{because}: {shlex.join(command)}"
        )

    def _check_structures(self, structures: Sequence[str] | None) -> tuple[str, ...]:
        known = self.library.structures
        if isinstance(structures, str):
            raise InputError(f"structures must be a list of names, got the string '{structures}'.")
        if structures is not None and not isinstance(structures, Sequence):
            raise InputError(
                "structures must be a list or tuple of names, in the order of their label values, "
                f"got {structures!r} ({type(structures).__name__})."
            )
        if not known:
            raise InputError("the library is empty: add annotated images before segmenting.")
        chosen = tuple(self._carried(known) if structures is None else structures)
        if not chosen:
            raise InputError(
                "structures is empty: name what to segment, or leave it out (None) for all of "
                f"{', '.join(known)}."
            )
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise InputError(
                f"the library has no exemplar of '{unknown[0]}'; it knows {', '.join(known)}. "
                "Annotate one, or ask for another structure."
            )
        if len(set(chosen)) < len(chosen) or len(chosen) > MOST_STRUCTURES:
            raise InputError(
                f"structures must be distinct and at most {MOST_STRUCTURES}, got {len(chosen)}."
            )
        carried = self._carried(chosen)
        if len(carried) < len(chosen):
            missing = next(name for name in chosen if name not in carried)
            raise InputError(
                f"no exemplar that shows '{missing}' carries the tags {dict(self.tags)}. Ask for "
                "other tags or structures, or tag an exemplar."
            )
        return chosen

    def _carried(self, structures: Sequence[str]) -> list[str]:
        """Return those of ``structures`` that exemplars with our tags show.

        Raises
        ------
        InputError
            If there is none at all.
        """
        if not self.tags:
            return list(structures)
        carried = [name for name in structures if self.library.count(name, tags=self.tags)]
        if carried:
            return carried
        for name, value in self.tags.items():
            if not any(self.library.count(one, tags={name: value}) for one in structures):
                raise InputError(
                    f"no exemplar of {', '.join(structures)} carries the tag {name}={value}; "
                    "'recallseg library list' shows the tags of each."
                )
        raise InputError(
            f"no exemplar of {', '.join(structures)} carries all of the tags {dict(self.tags)}; "
            "'recallseg library list' shows the tags of each."
        )

    @property
    def _size(self) -> dict[str, int]:
        """What a query takes of the model."""
        n = len(self._every)
        return {
            "n": n,
            "k": self.k + self.frames,
            "masks": len(self.structures) if self.frames else 0,
        }

    @property
    def _graphs(self) -> tuple[str, ...]:
        """What a query runs."""
        return ("embed", "encode", *(("memorize",) if self.frames else ()), "attend", "decode")

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


def _nearest(recalled: Sequence[Match]) -> float:
    """Distance to the nearest exemplar with the structure; to the nearest at all if none has it."""
    distances = [r.distance for r in recalled if not r.absent] or [r.distance for r in recalled]
    return min(distances, default=float("nan"))
