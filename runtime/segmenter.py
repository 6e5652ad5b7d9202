"""Image in, masks out: the composition of preprocessing, search, engines and postprocessing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.composition import Composition
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import InputError
from recallseg.engines.registry import load_engines
from recallseg.engines.verification import mask_dice
from recallseg.runtime.calibration import MIN_EXEMPLARS, Thresholds, conformal_upper, nearest_other
from recallseg.runtime.checks import check_image
from recallseg.runtime.library import Library
from recallseg.runtime.postprocess import Out, finish_masks
from recallseg.runtime.preprocess import prepare_image
from recallseg.runtime.presence import DOUBTFUL_SHARE, LEAST_SHARE, presence_share
from recallseg.runtime.result import Quality, Recalled, Result, Score
from recallseg.runtime.temporal import TemporalMemories
from recallseg.runtime.timings import Timings
from recallseg.runtime.workspace import Workspace

__all__ = ["Segmenter"]

ABSENT_SCORE = -10.0
"""Object score when the recalled exemplars say absent: SAM 2's logit of an unset pixel."""

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
    memories : most memories of earlier frames that a query of a sequence takes beside its k
        exemplars, see :meth:`temporal_memories`.

    Raises
    ------
    InputError
        For an unknown structure, k = 0 or more than there is, or an unknown engine or precision.
    EngineUnavailableError, EngineRunError, BundleError, LibraryError
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
        memories: int = 0,
    ) -> None:
        self.library = library if isinstance(library, Library) else Library.open(library)
        self.bundle = self.library.bundle
        self.k, self.memories = k, memories
        self.engine, self.precision = engine, precision
        self.structures = self._check_structures(structures)
        self.labels = MappingProxyType({name: i + 1 for i, name in enumerate(self.structures)})
        self._tags = dict(tags or {})
        self._check_k()
        self._composition = Composition(
            load_engines(
                self.bundle,
                engine,
                precision,
                options=EngineOptions(threads),
                graphs=(
                    "embed",
                    "encode",
                    *(("memorize",) if memories else ()),
                    "attend",
                    "decode",
                ),
            )
        )
        self.workspace = Workspace(
            self.bundle.geometry,
            self.bundle.memory,
            n=len(self.structures),
            k=k + memories,
        )
        self._lock = Lock()
        self._thresholds: dict[str, Thresholds] = {}
        self._calibrated_for = ""

    def segment(
        self,
        image: NDArray[Any],
        *,
        deadline_ms: float | None = None,
        out: Out = (None, None),
        temporal: TemporalMemories | None = None,
    ) -> Result:
        """Segment one image.

        Parameters
        ----------
        image : HxW grey or HxWx3 RGB, integer or floating, any size.
        deadline_ms : most milliseconds from this call to the result, waiting for other threads
            included; None for no limit. Looked at between stages.
        out : a label map (uint8 HxW) and masks (bool nxHxW) to write into; None for new ones.
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
        with timings.locked(self._lock):
            return self._segment(
                check_image(image), timings, excluded=None, out=out, temporal=temporal
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
            w = self.workspace
            self._prepare(check_image(image), Timings(), "embed")
            self._composition.embed(w.embed_image, w.embedding)
            return min(_nearest(self._search(name, None)) for name in self.structures)

    def warm_up(self, runs: int = 2) -> None:
        """Run on a blank image, so that the first real query is as fast as the next."""
        side = self.bundle.geometry.image_size
        blank = np.zeros((side, side), np.uint8)
        for _ in range(runs):
            self.segment(blank)

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
                result = self._segment(check_image(image), Timings(), excluded=exemplar.key)
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
        image: NDArray[Any],
        timings: Timings,
        *,
        excluded: str | None,
        out: Out = (None, None),
        temporal: TemporalMemories | None = None,
    ) -> Result:
        w = self.workspace
        earlier = [0 if temporal is None else temporal.count(i) for i in range(w.n)]
        self._prepare(image, timings, "encode", "embed")
        with timings("embed"):
            self._composition.embed(w.embed_image, w.embedding)
        with timings("search"):
            recalled = {name: self._search(name, excluded) for name in self.structures}
        with timings("encode"):
            self._composition.encode(w.encode_image, w.features)

        iou = np.zeros(len(self.structures), np.float32)
        object_score = np.full(len(self.structures), ABSENT_SCORE, np.float32)
        for k, members in self._groups(recalled, earlier):
            n = len(members)
            recall, prediction = w.recall_for(n, k), w.prediction_for(n)
            with timings("gather"):
                for row, index in enumerate(members):
                    name = self.structures[index]
                    keys = [r.key for r in recalled[name] if not r.absent]
                    memories, pointers = recall.memories[row], recall.pointers[row]
                    self.library.gather(keys, name, memories[: len(keys)], pointers[: len(keys)])
                    if temporal is not None:
                        temporal.gather(index, memories[len(keys) :], pointers[len(keys) :])
            with timings("attend"):
                self._composition.attend(w.features, recall, prediction)
            with timings("decode"):
                self._composition.decode(w.features, prediction)
            w.logits[members] = prediction.logits
            iou[members], object_score[members] = prediction.iou, prediction.object_score

        with timings("finish"):
            present = [bool(score > 0) for score in object_score]
            height, width = image.shape[:2]
            masks, label_map = finish_masks(w.logits, present, (height, width), w.pixels, out)
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
                temporal.remember(self._composition, w.features, trusted)
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
            temporal=MappingProxyType(dict(zip(self.structures, earlier, strict=True))),
            notice=self.bundle.notice,
        )

    def _prepare(self, image: NDArray[Any], timings: Timings, *graphs: str) -> None:
        """Fill the inputs of ``embed``, ``encode`` or both from a checked image."""
        w = self.workspace
        inputs = {"embed": w.embed_image, "encode": w.encode_image}
        targets = [(inputs[name], self.bundle.normalisation[name]) for name in graphs]
        with timings("prepare"):
            prepare_image(image, self.library.intensity, w.pixels, *targets)

    def _search(self, structure: str, excluded: str | None) -> tuple[Recalled, ...]:
        """Return the k nearest exemplars that show a structure, and nearer ones that lack it."""
        wanted = self.k if excluded is None else min(self.k + 1, self.library.count(structure))
        recalled: list[Recalled] = []
        shown = 0
        for match in self.library.search(
            self.workspace.embedding[0], structure, wanted, tags=self._tags or None
        ):
            if match.key != excluded and shown < self.k:
                recalled.append(Recalled(match.key, match.distance, match.absent))
                shown += not match.absent
        return tuple(recalled)

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
            for start in range(0, len(members), self.workspace.group):
                yield count, members[start : start + self.workspace.group]

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
