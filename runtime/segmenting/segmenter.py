"""Image in, masks out: the composition of preprocessing, search, engines and postprocessing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.device import Device, on_gpu
from recallseg.engines.errors import InputError
from recallseg.engines.verification import mask_dice
from recallseg.runtime.library import Library
from recallseg.runtime.model.frame_memories import TemporalMemories
from recallseg.runtime.model.query import GpuOptions, Wanted, open_query
from recallseg.runtime.segmenting.calibration import (
    MIN_EXEMPLARS,
    Thresholds,
    conformal_upper,
    nearest_other,
)
from recallseg.runtime.segmenting.presence import (
    ABSENT_SCORE,
    DOUBTFUL_SHARE,
    LEAST_SHARE,
    presence_share,
)
from recallseg.runtime.segmenting.reach import REACH, within_reach
from recallseg.runtime.segmenting.result import Quality, Recalled, Result, Score
from recallseg.runtime.segmenting.timings import Timings

__all__ = ["Segmenter"]

MOST_STRUCTURES = 255  # values of an 8-bit label map, 0 being background

Progress = Callable[[int, int], None]


class Segmenter:
    """Segments images by recalling a library's exemplars.

    Buffers and engines are made once, here. Calls from several threads wait for each other.

    Parameters
    ----------
    library : a :class:`Library` or its folder.
    k : exemplars to recall for each structure; at most as many as are annotated for it.
    structures : what to segment, in the order of the label values; None means all that the library
        knows.
    engine, precision : see INTERFACES "Names".
    threads : CPU threads; None means all cores that this process may use.
    tags : recall only exemplars that carry all of these tags.
    reach : of the k, recall only those at most this many times as far as the nearest (1 or more);
        ``math.inf`` recalls k whatever their distance, so that every query takes the same time.
    memories : most memories of earlier frames that a query of a sequence takes beside its k
        exemplars, see :meth:`temporal_memories`.
    gpu : how engines on a GPU use it; None for its defaults. Engines on the CPU refuse it.

    Raises
    ------
    InputError
        For an unknown structure, k = 0 or more than there is, a reach below 1, or an unknown
        engine or precision.
    EngineUnavailableError, EngineRunError, DeviceMemoryError, BundleError, LibraryError
    """

    def __init__(
        self,
        library: Library | str | Path,
        *,
        k: int = 4,
        structures: Sequence[str] | None = None,
        engine: str = "onnxruntime-cpu",
        precision: str = "fp32",
        threads: int | None = None,
        tags: Mapping[str, str] | None = None,
        reach: float = REACH,
        memories: int = 0,
        gpu: GpuOptions | None = None,
    ) -> None:
        self.library = library if isinstance(library, Library) else Library.open(library)
        self.bundle = self.library.bundle
        self.k, self.memories, self.reach = k, memories, reach
        self.engine, self.precision = engine, precision
        self.structures = self._check_structures(structures)
        self.labels = MappingProxyType({name: i + 1 for i, name in enumerate(self.structures)})
        self._tags = dict(tags or {})
        self._check_k()
        self._query = open_query(
            self.library,
            self.structures,
            k=k + memories,
            engine=engine,
            precision=precision,
            graphs=("embed", "encode", *(("memorize",) if memories else ()), "attend", "decode"),
            threads=threads,
            gpu=gpu,
        )
        self._lock = Lock()
        self._thresholds: dict[str, Thresholds] = {}
        self._calibrated_for = ""

    @property
    def device(self) -> Device | None:
        """The GPU that it runs on; None on a CPU."""
        return self._query.device

    @property
    def workspace(self) -> Any:
        """The buffers of a query; ``nbytes`` is their size."""
        return self._query.workspace

    def segment(
        self,
        image: Any,
        *,
        deadline_ms: float | None = None,
        out: tuple[Any, Any] = (None, None),
        temporal: TemporalMemories | None = None,
    ) -> Result:
        """Segment one image.

        Parameters
        ----------
        image : HxW grey or HxWx3 RGB, integer or floating, any size. An engine on a GPU also takes
            a contiguous array that lies there (``__cuda_array_interface__`` or DLPack).
        deadline_ms : most milliseconds from this call to the result, waiting for other threads
            included; None for no limit. Looked at between stages.
        out : a label map (uint8 HxW) and masks (bool nxHxW) to write into; None for new ones. With
            an engine on a GPU and its pixel kernels, arrays that lie there stay there.
        temporal : memories of the frames before, made by :meth:`temporal_memories`. They are used
            beside the recalled ones, and what this image shows is added; structures that are
            absent or suspect are not.

        Returns
        -------
        Result
            Masks on the image's own grid; its arrays are those of ``out``, or new.

        Raises
        ------
        InputError
            For another shape or dtype, an empty image, NaN or infinite pixels, or temporal
            memories of another segmenter.
        EngineRunError
            If an engine fails.
        DeadlineError
            If it took too long.
        """
        timings = Timings(deadline_ms)
        if temporal is not None:
            self._check_temporal(temporal)
            if out[1] is not None and on_gpu(out[1]):
                raise InputError(
                    "memories of this frame are made of masks on the CPU: pass no masks of the GPU "
                    "as out beside temporal."
                )
        with timings.locked(self._lock):
            return self._segment(
                self._query.check(image), timings, excluded=None, out=out, temporal=temporal
            )

    def temporal_memories(self) -> TemporalMemories:
        """Return room for the memories of one sequence of frames or slices, empty.

        Raises
        ------
        InputError
            If the segmenter was made with ``memories=0``.
        """
        if not self.memories:
            raise InputError(
                "this segmenter has no room for memories of earlier frames: make it with "
                "Segmenter(..., memories=3), say."
            )
        return TemporalMemories(self.bundle.geometry, len(self.structures), self.memories)

    def distance(self, image: NDArray[Any]) -> float:
        """Return the cosine distance (0..2) to the nearest exemplar that shows a structure.

        Costs an embedding and a search. ``image`` and what is raised: see :meth:`segment`.
        """
        with self._lock:
            self._query.prepare(self._query.check(image), "embed")
            embedding = self._query.embed()
            return min(_nearest(self._search(embedding, n, None)) for n in self.structures)

    def logits(self) -> NDArray[np.float32]:
        """Return the mask logits of the last query, nx(S/4)x(S/4); those of absent ones are old."""
        with self._lock:
            logits: NDArray[np.float32] = self._query.logits().copy()
            return logits

    def warm_up(self, runs: int = 2) -> None:
        """Run on a blank image, so that the first real query is as fast as the next.

        On a GPU a query is prepared, or recorded, for each number of memories that may come.
        """
        side = self.bundle.geometry.image_size
        blank = np.zeros((side, side), np.uint8)
        every = self.device is not None and self.reach < math.inf
        with self._lock:
            image = self._query.check(blank)
            for exemplars in range(1 if every else self.k, self.k + 1):
                for _ in range(runs):
                    self._segment(image, Timings(), excluded=None, exemplars=exemplars)

    def calibrate(self, progress: Progress | None = None) -> Mapping[str, Thresholds]:
        """Segment every exemplar from the others, and store what is normal in the library.

        The library must have kept its source images and be open for writing. Costs one query per
        exemplar. ``progress`` is told how many are done, of how many.

        Raises
        ------
        InputError
            If k leaves no exemplar out, or sources were not kept.
        """
        with self._lock:
            exemplars = list(self.library)
            iou: dict[str, list[float]] = {name: [] for name in self.structures}
            dice: dict[str, list[float]] = {name: [] for name in self.structures}
            for done, exemplar in enumerate(exemplars):
                image, masks = self.library.source(exemplar.key)
                checked = self._query.check(image)
                result = self._segment(checked, Timings(), excluded=exemplar.key)
                for name in self.structures:
                    if name in masks and result.scores[name].present:
                        iou[name].append(result.scores[name].iou)
                        dice[name].append(mask_dice(result.masks[name], masks[name]))
                if progress is not None:
                    progress(done + 1, len(exemplars))
            thresholds = {}
            for name, distance in self._distance_thresholds().items():
                upper = conformal_upper([-value for value in iou[name]])
                thresholds[name] = Thresholds(
                    distance=distance.distance,
                    iou=None if upper is None else -upper,
                    exemplars=len(iou[name]),
                    dice=float(np.median(dice[name])) if dice[name] else None,
                )
            self.library.store_calibration(
                {
                    "k": self.k,
                    "precision": self.precision,
                    "thresholds": {name: value.to_json() for name, value in thresholds.items()},
                }
            )
            self._thresholds, self._calibrated_for = thresholds, self.library.digest
            return MappingProxyType(thresholds)

    def _segment(
        self,
        image: Any,
        timings: Timings,
        *,
        excluded: str | None,
        out: tuple[Any, Any] = (None, None),
        temporal: TemporalMemories | None = None,
        exemplars: int | None = None,
    ) -> Result:
        """Run a query; with ``exemplars`` it recalls exactly so many, to warm up."""
        query = self._query
        earlier = [
            0 if temporal is None else temporal.count(i) for i in range(len(self.structures))
        ]
        with timings("prepare"):
            query.prepare(image, "encode", "embed")
        with timings("embed"):
            embedding = query.embed()
        with timings("search"):
            recalled = {
                name: self._search(embedding, name, excluded, exemplars) for name in self.structures
            }
        with timings("encode"):
            query.encode()
        for k, members in self._groups(recalled, earlier):
            with timings("gather"):
                query.recall([self._wanted(i, recalled) for i in members], k, temporal)
            with timings("attend"):
                query.attend()
            with timings("decode"):
                query.decode()
        with timings("finish"):
            masks, label_map, iou, object_score = query.finish(tuple(image.shape[:2]), out)
        present = [bool(score > 0) for score in object_score]
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
        quality = self._judge(scores, recalled)
        if temporal is not None:
            with timings("memorize"):
                trusted = {
                    i: masks[i]
                    for i, name in enumerate(self.structures)
                    if present[i] and name not in quality.reasons
                }
                temporal.remember(query.memorize, trusted)
        return Result(
            masks=MappingProxyType(dict(zip(self.structures, masks, strict=True))),
            label_map=label_map,
            labels=self.labels,
            scores=MappingProxyType(scores),
            recalled=MappingProxyType(recalled),
            timings=timings.finished(),
            quality=quality,
            bundle_identity=self.bundle.identity,
            library_digest=self.library.digest,
            engine=self.engine,
            precision=self.precision,
            k=self.k,
            memory_format=self.library.memory_format,
            temporal=MappingProxyType(dict(zip(self.structures, earlier, strict=True))),
            notice=self.bundle.notice,
        )

    def _wanted(self, index: int, recalled: Mapping[str, tuple[Recalled, ...]]) -> Wanted:
        name = self.structures[index]
        return Wanted(index, name, [r.key for r in recalled[name] if not r.absent])

    def _search(
        self,
        embedding: NDArray[np.float32],
        structure: str,
        excluded: str | None,
        exemplars: int | None = None,
    ) -> tuple[Recalled, ...]:
        """Return the k nearest exemplars that show a structure, and nearer ones that lack it.

        Those out of reach are left out; with ``exemplars`` so many that show it are all there is.
        """
        wanted = self.k if excluded is None else min(self.k + 1, self.library.count(structure))
        recalled: list[Recalled] = []
        shown = 0
        tags = self._tags or None
        for match in self.library.search(embedding, structure, wanted, tags=tags):
            if match.key != excluded and shown < self.k:
                recalled.append(Recalled(match.key, match.distance, match.absent))
                shown += not match.absent
        if exemplars is not None:
            return tuple([r for r in recalled if not r.absent][:exemplars])
        return within_reach(recalled, self.reach)

    def _groups(
        self, recalled: Mapping[str, tuple[Recalled, ...]], earlier: Sequence[int]
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield (memories, structures by position): those with equal counts share a call.

        ``earlier`` are the temporal memories of each structure. A structure that is absent by the
        evidence of the nearest exemplars is left out.
        """
        by_count: dict[int, list[int]] = {}
        for index, name in enumerate(self.structures):
            if presence_share(recalled[name]) >= LEAST_SHARE:
                count = sum(not r.absent for r in recalled[name]) + earlier[index]
                by_count.setdefault(count, []).append(index)
        for count, members in sorted(by_count.items()):
            for start in range(0, len(members), self._query.group):
                yield count, members[start : start + self._query.group]

    def _judge(
        self, scores: Mapping[str, Score], recalled: Mapping[str, tuple[Recalled, ...]]
    ) -> Quality:
        thresholds = self._current_thresholds()
        reasons: dict[str, tuple[str, ...]] = {}
        calibrated = True
        for name, score in scores.items():
            limits, found = thresholds[name], []
            calibrated &= limits.iou is not None
            if (
                limits.distance is not None
                and recalled[name]
                and recalled[name][0].distance > limits.distance
            ):
                found.append(
                    f"unlike the library: distance {recalled[name][0].distance:.3f} to the nearest "
                    f"exemplar, usual is up to {limits.distance:.3f}"
                )
            if not score.present and score.object_score != ABSENT_SCORE:
                found.append(f"likely absent: object score {score.object_score:.1f}")
            if score.present and score.presence < DOUBTFUL_SHARE:
                found.append("may be absent: annotated images most like this one lack it")
            if score.present and limits.iou is not None and score.iou < limits.iou:
                found.append(
                    f"low IoU estimate {score.iou:.2f}, usual is at least {limits.iou:.2f}"
                )
            if found:
                reasons[name] = tuple(found)
        flag = "suspect" if reasons else "ok" if calibrated else "uncalibrated"
        return Quality(flag, MappingProxyType(reasons))

    def _current_thresholds(self) -> dict[str, Thresholds]:
        """Return thresholds that belong to the library as it is now."""
        if self._calibrated_for != self.library.digest:
            thresholds = self._distance_thresholds()
            stored = self.library.calibration
            if stored is not None and stored["precision"] == self.precision:
                for name, value in stored["thresholds"].items():
                    if name in thresholds:
                        thresholds[name] = Thresholds.from_json(value)
            self._thresholds, self._calibrated_for = thresholds, self.library.digest
        return self._thresholds

    def _distance_thresholds(self) -> dict[str, Thresholds]:
        thresholds = {}
        for name in self.structures:
            _, embeddings = self.library.embeddings(name)
            enough = len(embeddings) >= MIN_EXEMPLARS
            limit = conformal_upper(nearest_other(embeddings)) if enough else None
            thresholds[name] = Thresholds(distance=limit, exemplars=len(embeddings))
        return thresholds

    def _check_structures(self, structures: Sequence[str] | None) -> tuple[str, ...]:
        known = self.library.structures
        if isinstance(structures, str):
            raise InputError(f"structures must be a list of names, got the string '{structures}'.")
        chosen = tuple(known if structures is None else structures)
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise InputError(
                f"the library has no exemplar of '{unknown[0]}'; it knows "
                f"{', '.join(known) or 'nothing'}. Annotate one, or ask for another structure."
            )
        if not chosen:
            raise InputError("the library is empty: add annotated images before segmenting.")
        if len(set(chosen)) < len(chosen) or len(chosen) > MOST_STRUCTURES:
            raise InputError(
                f"structures must be distinct and at most {MOST_STRUCTURES}, got {len(chosen)}."
            )
        return chosen

    def _check_k(self) -> None:
        most = self.bundle.geometry.max_k
        if not 1 <= self.k <= most:
            raise InputError(f"k must be 1 to {most} for this bundle, got {self.k}.")
        if not self.reach >= 1:
            raise InputError(
                f"reach must be at least 1 (times the nearest distance), got {self.reach}."
            )
        if not 0 <= self.memories <= most - self.k:
            raise InputError(
                f"memories of earlier frames must be 0 to {most - self.k} beside k = {self.k} for "
                f"this bundle, got {self.memories}."
            )
        for name in self.structures:
            annotated = self.library.count(name)
            if self.k > annotated:
                raise InputError(
                    f"k = {self.k}, but only {annotated} exemplars are annotated for '{name}'. "
                    "Use a smaller k, or annotate more images."
                )

    def _check_temporal(self, temporal: TemporalMemories) -> None:
        wanted = (len(self.structures), self.memories)
        if (temporal.structures, temporal.size) != wanted:
            raise InputError(
                f"these temporal memories are for {temporal.structures} structures and "
                f"{temporal.size} memories each, the segmenter has {wanted[0]} and {wanted[1]}. "
                "Use those that its own temporal_memories() makes."
            )

    def __repr__(self) -> str:
        return (
            f"Segmenter({', '.join(self.structures)}; k={self.k}, {self.engine} {self.precision}, "
            f"workspace {self.workspace.nbytes / 2**20:.0f} MiB)"
        )


def _nearest(recalled: Sequence[Recalled]) -> float:
    """Distance to the nearest exemplar with the structure; to the nearest at all if none has it."""
    distances = [r.distance for r in recalled if not r.absent] or [r.distance for r in recalled]
    return min(distances, default=float("nan"))
