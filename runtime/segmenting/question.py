"""What a segmenter asks of its model about each image, and the result made of the answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg import __version__
from recallseg.engines.device import on_gpu
from recallseg.engines.operators import operators_digest
from recallseg.engines.precisions import find_precision
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.library import Library
from recallseg.runtime.library.exemplar import Match, Recollection, StoredMemory
from recallseg.runtime.model.frame_memories import FrameMemories
from recallseg.runtime.model.kept_looks import Kept
from recallseg.runtime.model.model import Model
from recallseg.runtime.model.postprocess import check_out_here
from recallseg.runtime.model.view import Refine, View, Wanted, groups
from recallseg.runtime.segmenting.acquisition import Acquisition
from recallseg.runtime.segmenting.presence import LEAST_SHARE, presence_share
from recallseg.runtime.segmenting.probabilities import LogitsOnModel
from recallseg.runtime.segmenting.reach import nearest, within_reach
from recallseg.runtime.segmenting.recipe import Provenance, Recipe
from recallseg.runtime.segmenting.refining import Refiner
from recallseg.runtime.segmenting.result import Result, Score
from recallseg.runtime.segmenting.standing import Standings, differing_from
from recallseg.runtime.segmenting.timings import Timings

__all__ = ["Keeper", "Question"]


class Keeper:
    """Keeps of a query what its answer can be corrected with.

    Attributes
    ----------
    view, kept : the image on the model, and a copy with the conditioned features.
    logits : nx(S/4)x(S/4); NaN for structures that are absent by the evidence.
    conditioned : positions of the structures that something was recalled for.
    """

    view: View
    kept: Kept
    logits: NDArray[np.float32]

    def __init__(self) -> None:
        self.conditioned: set[int] = set()

    def begin(self, view: View, structures: int) -> None:
        """Keep the image."""
        self.view, self.kept = view, view.keep(structures)

    def attended(self, view: View) -> None:
        """Keep the conditioned features of a group."""
        self.conditioned.update(view.keep_conditioned(self.kept))


class Question:
    """One question, asked of image after image.

    Parameters
    ----------
    library, model : who answers it.
    recipe, structures : what is asked.
    frames : most frame memories that a query of a sequence takes beside its exemplars.
    refining : the head at work; None without one.
    standings : what answers are judged by.

    Attributes
    ----------
    labels : label value by structure.
    view : of the last image; None before the first.
    """

    def __init__(
        self,
        library: Library,
        model: Model,
        recipe: Recipe,
        structures: tuple[str, ...],
        *,
        frames: int,
        refining: Refiner | None,
        standings: Standings,
    ) -> None:
        self.library, self.model, self.recipe = library, model, recipe
        self.structures, self.frames = structures, frames
        self.labels = FrozenMap({name: i + 1 for i, name in enumerate(structures)})
        self.refining, self.standings = refining, standings
        self.view: View | None = None
        self._made: Provenance | None = None  # of the last result: few results change it

    @property
    def every(self) -> tuple[str, ...]:
        """What is asked of the model: the structures, and others that the head looks at."""
        if self.refining is None:
            return self.structures
        beside = (n for n in self.refining.head.structures if n not in self.structures)
        return (*self.structures, *beside)

    @property
    def size(self) -> dict[str, int]:
        """What a query takes of the model."""
        n = len(self.every)
        return {
            "n": n,
            "k": self.recipe.k + self.frames,
            "masks": len(self.structures) if self.frames else 0,
        }

    @property
    def graphs(self) -> tuple[str, ...]:
        """What a query runs."""
        return ("embed", "encode", *(("memorize",) if self.frames else ()), "attend", "decode")

    def ask(self, image: Any, timings: Timings, **options: Any) -> Result:
        """Run a query; options as :meth:`_queue` has them."""
        return self.begin(image, timings, **options)()

    def begin(self, image: Any, timings: Timings, **options: Any) -> Callable[[], Result]:
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
            for i in range(len(self.every))
        ]
        with timings("prepare"):
            self.view = view = view or self.model.look(image, self.library.intensity)
            check_out_here(out, n, view.shape)
            view.begin(len(self.every))
        with timings("embed"):
            embedding = view.embedding
        with timings("search"):
            recollection = self.library.recall(
                embedding, self.every, self.recipe.k, tags=self.recipe.tags, without=without
            )
            recalled = {
                name: within_reach(found.matches, self.recipe.reach)
                for name, found in recollection.found.items()
            }
            memories = self._memories(recollection, recalled, exemplars)
            recalled = {name: recalled[name] for name in self.structures}
        with timings("encode"):
            view.encode()
            if keeper is not None:
                keeper.begin(view, len(self.every))
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
        standing = self.standings.now()
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
                    nearest(recalled[name]),
                    presence_share(recalled[name]),
                    present[i],
                )
                for i, name in enumerate(self.structures)
            }
            available = {name: recollection.found[name].available for name in self.structures}
            left = {name for name, few in zip(self.structures, small, strict=True) if few}
            drawn = zip(self.structures, masks, strict=True)
            blank = {name for name, mask in drawn if not on_gpu(mask) and not mask.any()}
            quality = standing.judge(scores, recalled, available, differing, left, blank)
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
                notice=self.model.bundle.notice,
                spacing=None if acquisition is None else acquisition.spacing,
                logits=logits,
            )

        if frame_memories is None:
            return conclude
        result = conclude()  # its masks are memorized before another image is looked at
        return lambda: result

    @property
    def _operators(self) -> str | None:
        if find_precision(self.model.precision).native:
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
                self.model.graph_digests(*self.graphs)
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
            for group in groups(members, self.model.bundle.geometry.max_n):
                yield count, [*group]

    def _refine(self, without: Collection[str]) -> Refine | None:
        """Return what draws boundaries, by units that have not seen what is passed over."""
        if self.refining is None:
            return None
        return self.refining.refining(self.library, self.every, without)
