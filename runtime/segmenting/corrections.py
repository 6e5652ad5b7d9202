"""A person in the loop: a proposal, corrected by clicks, and accepted as an exemplar.

The image is encoded once, and what was recalled is attended to once; each correction is then one
call of the graph ``correct``, SAM 2's mask decoder with prompts: with all points that were set so
far and the mask before, as its video predictor does it. A structure of which nothing is recalled (a
new one, an empty library) is decoded from the image alone, as SAM 2 does with a first frame.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.device import on_gpu
from recallseg.engines.errors import InputError, StaleViewError
from recallseg.engines.pixels.interface import MOST_STRUCTURES
from recallseg.runtime.checks import check_mask, check_name
from recallseg.runtime.formats.images import open_image
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.library import Library
from recallseg.runtime.library.encoding import Encoded
from recallseg.runtime.model.model import Model
from recallseg.runtime.model.view import View
from recallseg.runtime.segmenting.acquisition import Acquisition
from recallseg.runtime.segmenting.corrected_results import CorrectedResults, State, corrections_of
from recallseg.runtime.segmenting.mixing import mix
from recallseg.runtime.segmenting.presence import ABSENT_SCORE
from recallseg.runtime.segmenting.prompts import (
    FIRST_CORNER,
    INSIDE,
    OUTSIDE,
    SECOND_CORNER,
    SURE,
    Grid,
    Point,
    covered,
    deepest,
    logits_of,
    polygon_mask,
    sample_stroke,
)
from recallseg.runtime.segmenting.question import Keeper
from recallseg.runtime.segmenting.result import Result
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.segmenting.timings import Timings

__all__ = ["GRAPHS", "Corrections"]

GRAPHS = ("embed", "encode", "correct")
"""What correcting runs where nothing is recalled."""

Place = tuple[float, float]


class Corrections:
    """One image that a person corrects. Made by :meth:`recallseg.Segmenter.correct`.

    Every correction takes a structure's name, which may be a new one, and returns the result that
    it leads to; coordinates are pixels of the image, x to the right, y down, pixel centres at whole
    numbers. Each costs one call of the mask decoder at most. What a person says to be inside is
    taken to be there, whatever the object score. May be used by several threads, and beside others
    on the same model; if so many images are kept there that this one was dropped, it is encoded
    anew. If the library was changed before that, what is corrected from then on is recalled from it
    as it is now, which the result's provenance names; of structures that are still as they were
    proposed the quality says so.

    Parameters
    ----------
    library : whose rule for intensities holds, and which :meth:`accept` adds to; may be empty.
    image : see :meth:`recallseg.Segmenter.segment`; kept as a copy.
    segmenter : makes the proposal; None: nothing is recalled, and every structure is new.
    without, acquisition : see :meth:`recallseg.Segmenter.segment`.
    model : what it runs on where there is no segmenter; the library's own by default.

    Attributes
    ----------
    proposal : the segmenter's result before any correction; None without a segmenter.

    Raises
    ------
    BundleError
        If the bundle has no graph ``correct``.
    InputError, EngineRunError, ModelClosedError
    HostMemoryError, DeviceMemoryError
    """

    def __init__(
        self,
        library: Library,
        image: Any,
        *,
        segmenter: Segmenter | None = None,
        without: Collection[str] = (),
        acquisition: Acquisition | None = None,
        model: Model | None = None,
    ) -> None:
        self._library, self._segmenter = library, segmenter
        if segmenter is not None:
            self._model = segmenter.model
        else:
            self._model = model or library.model()
            library.accept(self._model)
        self._without, self._acquisition = tuple(without), acquisition
        self._model.reserve(1, 1, graphs=GRAPHS)  # also tells a bundle that cannot
        self._image = self._model.copy_frame(open_image(image))
        self._intensity = library.intensity
        self._history: list[tuple[str, State | None]] = []
        with self._model.turns:
            self.proposal, self._proposed_logits = self._look()
            self._grid = Grid(self._view.shape, self._model.bundle.geometry)
            self._states = self._proposed()
            self._results = CorrectedResults(
                library, self._model, self._grid, self.proposal, acquisition
            )
        self._result: Result | None = None

    # What it shows

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self._grid.shape

    @property
    def structures(self) -> tuple[str, ...]:
        """Structures of the result, in the order of their label values."""
        return tuple(self._states)

    @property
    def corrections(self) -> Mapping[str, int]:
        """How often each structure was corrected; those that never were are left out."""
        return corrections_of(self._states)

    @property
    def result(self) -> Result:
        """What it has come to. New structures have the next label values.

        Corrected structures give no reason to look any more; their mask is what a person says, and
        their IoU estimate and object score are the last correction's.
        """
        with self._model.turns:
            if self._result is None:
                self._result = self._results.make(self._states)
            return self._result

    # Corrections

    def click(self, structure: str, x: float, y: float, inside: bool = True) -> Result:
        """Say of one place that it belongs to a structure, or that it does not.

        Raises
        ------
        InputError
            If it lies outside of the image, or the name cannot be one.
        EngineRunError, ModelClosedError
        """
        place = self._grid.check(x, y)
        return self._more(structure, [place], inside)

    def scribble(
        self, structure: str, places: Iterable[Sequence[float]], inside: bool = True
    ) -> Result:
        """Say the same of a stroke, x and y of places along it; up to six of it are used.

        Raises what :meth:`click` does, also for a stroke without a place.
        """
        return self._more(structure, sample_stroke(self._stroke(places, "a scribble", 1)), inside)

    def box(self, structure: str, x0: float, y0: float, x1: float, y1: float) -> Result:
        """Say where a structure is by two opposite corners; begins anew with it.

        The mask and the points before are put aside; what was recalled is not. Raises what
        :meth:`click` does, also for a box without an area.
        """
        corners = [self._grid.check(x, y, "a corner") for x, y in ((x0, y0), (x1, y1))]
        return self._decode(check_name(structure), _box(corners), None)

    def lasso(
        self, structure: str, places: Iterable[Sequence[float]], inside: bool = True
    ) -> Result:
        """Draw roughly round a structure, or round what does not belong to it.

        What is drawn round is given as a box and a rough mask, and begins anew; what is not to
        belong is taken off the mask before, and clicked away. Raises what :meth:`click` does, also
        for fewer than three places or an outline that holds no pixel.
        """
        name = check_name(structure)
        outline = self._stroke(places, "a lasso", 3)
        mask = polygon_mask(outline, self.shape)
        if not mask.any():
            raise InputError("the lasso holds no pixel. Draw round more.")
        size = self._grid.geometry.logit_size
        if inside:
            xs, ys = zip(*outline, strict=True)
            box = _box([(min(xs), min(ys)), (max(xs), max(ys))])
            return self._decode(name, box, logits_of(mask, size))
        before = self._states.get(name, State())
        x, y = deepest(mask)
        prior = before.prior
        if prior is not None:
            share = covered(mask, size)
            prior = np.minimum(prior, np.float32(SURE) * (1 - 2 * share))
        points = (*before.points, Point(x, y, OUTSIDE))
        return self._decode(name, points, prior)

    def draw(self, structure: str, mask: Any) -> Result:
        """Give a structure's mask HxW, boolean or of 0 and 1, to the pixel; empty for absent.

        Runs nothing. What comes after corrects it. Raises InputError for another shape or kind.
        """
        name = check_name(structure)
        drawn = check_mask(mask, self.shape, name, allow_empty=True)
        logits = logits_of(drawn, self._grid.geometry.logit_size)
        there = bool(drawn.any())
        with self._model.turns:
            self._check_room(name)
            times = self._states.get(name, State()).times + 1
            score = SURE if there else ABSENT_SCORE
            return self._set(name, State((), logits, 1.0, score, there, drawn.copy(), times))

    def undo(self) -> Result:
        """Take the last correction back. Runs nothing; InputError if there is none."""
        with self._model.turns:
            if not self._history:
                raise InputError("there is no correction to take back.")
            name, before = self._history.pop()
            if before is None:
                del self._states[name]
            else:
                self._states[name] = before
            self._result = None
            return self.result

    def reset(self, structure: str | None = None) -> Result:
        """Go back to the proposal, of one structure or of all; cannot be taken back."""
        with self._model.turns:
            fresh = self._proposed()
            for name in [*self._states] if structure is None else [structure]:
                if name in fresh:
                    self._states[name] = fresh[name]
                elif name in self._states:
                    del self._states[name]
                else:
                    raise InputError(
                        f"there is no structure '{name}' here; there are "
                        f"{', '.join(self._states) or 'none'}."
                    )
                self._history = [entry for entry in self._history if entry[0] != name]
            self._result = None
            return self.result

    # What becomes of it

    def accept(
        self,
        library: Library | None = None,
        *,
        structures: Sequence[str] | None = None,
        key: str | None = None,
        **details: Any,
    ) -> str:
        """Add the image and its masks, as they are now, to a library; return the exemplar's key.

        Structures without a mask are recorded as absent. Costs ``memorize``, and nothing else where
        the library is of the same bundle and has the same rule for intensities.

        Parameters
        ----------
        library : open for writing; that of the session by default.
        structures : which of them are right; all by default.
        key, details : see :meth:`recallseg.Library.add`, e.g. ``tags``.

        Raises
        ------
        InputError
            If there is no structure to accept, or a name is none of :attr:`structures`.
        LibraryWriteError, EngineRunError
        """
        target = self._library if library is None else library
        target.check_writable("accept")
        result = self.result
        chosen = self.structures if structures is None else tuple(structures)
        unknown = [name for name in chosen if name not in result.masks]
        if unknown or not chosen:
            what = f"'{unknown[0]}' is none of them" if unknown else "none was named"
            raise InputError(
                f"accept takes structures of the result, {', '.join(self.structures) or 'none'}: "
                f"{what}."
            )
        masks = {name: result.masks[name] for name in chosen if result.masks[name].any()}
        absent = tuple(name for name in chosen if name not in masks)
        same = target.intensity == self._intensity and self._model.bundle.known_as(
            target.bundle_identity
        )
        encoder = _KeptImage(self) if same else None
        return target.add(
            self._host_image(), masks, absent=absent, key=key, encoder=encoder, **details
        )

    def memorize(self, masks: Mapping[str, NDArray[np.bool_]]) -> Encoded:
        """Return embedding, memories and pointers of masks HxW of this image, on the host."""
        with self._model.turns:
            self.bring_back()
            return self._model.memorize_kept(self._kept, masks)

    def close(self) -> None:
        """Give back the room of what is kept; corrections then encode the image anew."""
        self._kept.close()

    def __repr__(self) -> str:
        done = ", ".join(f"{name}: {count}" for name, count in self.corrections.items())
        height, width = self.shape
        return f"recallseg.Corrections({height}x{width}; corrected: {done or 'nothing'})"

    # How

    def _look(self) -> tuple[Result | None, NDArray[np.float32]]:
        """Put the image on the model and keep it there, with what is recalled for it.

        Returns
        -------
        result : what is proposed now; None without a segmenter.
        logits : of its structures, nx(S/4)x(S/4).
        """
        keeper = Keeper()
        result, logits = None, np.empty(0, np.float32)
        if self._segmenter is not None:
            result = self._segmenter._question.ask(
                self._image,
                Timings(),
                without=self._without,
                acquisition=self._acquisition,
                keeper=keeper,
            )
            logits = keeper.logits
        else:
            view = self._model.look(self._image, self._intensity)
            keeper.begin(view, 0)
        self._view, self._kept = keeper.view, keeper.kept
        self._conditioned = keeper.conditioned
        self._labels = {} if result is None else dict(result.labels)
        self._room = len(self._labels)
        return result, logits

    def bring_back(self) -> View:
        """Return a view of the image, encoded anew if it was dropped meanwhile."""
        if self._view.valid and self._model.keeps(self._kept):
            return self._view
        try:
            self._view = self._model.put(self._kept)
        except StaleViewError:
            result, _ = self._look()
            if result is not None:
                self._results.looked(result)
        return self._view

    def _proposed(self) -> dict[str, State]:
        """Return the structures as they were proposed."""
        if self.proposal is None:
            return {}
        return {
            name: State(
                logits=self._proposed_logits[i] if score.object_score != ABSENT_SCORE else None,
                iou=score.iou,
                object_score=score.object_score,
                present=score.present,
            )
            for i, (name, score) in enumerate(self.proposal.scores.items())
        }

    def _stroke(self, places: Iterable[Sequence[float]], what: str, least: int) -> list[Place]:
        try:
            pairs = [(x, y) for x, y in places]
        except (TypeError, ValueError) as error:
            raise InputError(f"{what} is a list of (x, y), got {places!r:.200}.") from error
        if len(pairs) < least:
            raise InputError(f"{what} takes {least} places (x, y) or more, got {len(pairs)}.")
        return [self._grid.check(x, y, f"a place of {what}") for x, y in pairs]

    def _more(self, structure: str, places: Sequence[Place], inside: bool) -> Result:
        """Add points to those of a structure, and decode it with them."""
        name = check_name(structure)
        label = INSIDE if inside else OUTSIDE
        with self._model.turns:
            before = self._states.get(name, State())
            points = (*before.points, *(Point(x, y, label) for x, y in places))
            return self._decode(name, points, before.prior)

    def _decode(
        self, name: str, points: Sequence[Point], prior: NDArray[np.float32] | None
    ) -> Result:
        begin = perf_counter()
        with self._model.turns:
            self._check_room(name)
            view = self.bring_back()
            made = view.correct(self._kept, self._position(name), self._grid.prompts(points, prior))
            before, logits = self._states.get(name, State()), made.logits
            if self._position(name) != self._room:  # a mask from nothing may not be good yet
                known = len(before.points)
                new = points[known:] if tuple(points[:known]) == before.points else points
                logits = mix(prior, logits, points, new, self._grid)
            # Whoever points at something says that it is there.
            there = any(p.label != OUTSIDE for p in points) or made.object_score > 0
            state = State(
                tuple(points), logits, made.iou, made.object_score, there, None, before.times + 1
            )
            decoded = (perf_counter() - begin) * 1e3
            self._set(name, state)
            total = (perf_counter() - begin) * 1e3
            timings = {"correct": decoded, "finish": total - decoded, "total": total}
            self._result = replace(self.result, timings=FrozenMap(timings))
            return self._result

    def _check_room(self, name: str) -> None:
        """Raise InputError if a label map has no value left for a structure."""
        if name not in self._states and len(self._states) >= MOST_STRUCTURES:
            raise InputError(
                f"there are {MOST_STRUCTURES} structures already, as many as a label map holds: "
                f"'{name}' is one too many."
            )

    def _position(self, name: str) -> int:
        """Return where a structure's conditioned features are kept."""
        if self.proposal is not None and name in self.proposal.labels:
            position = self._labels.get(name, 0) - 1
            if position in self._conditioned:
                return position
        return self._room  # those of one of which nothing is recalled

    def _set(self, name: str, state: State) -> Result:
        self._history.append((name, self._states.get(name)))
        self._states[name] = state
        self._result = None
        return self.result

    def _host_image(self) -> NDArray[Any]:
        if on_gpu(self._image):
            with self._model.turns:
                return self._model._fetch(self._image)
        image: NDArray[Any] = self._image
        return image


@dataclass(frozen=True)
class _KeptImage:
    """A session as the encoder of the exemplar that it becomes: nothing but ``memorize`` runs."""

    session: Corrections

    def encode(self, image: NDArray[Any], masks: Mapping[str, NDArray[np.bool_]]) -> Encoded:
        return self.session.memorize(masks)

    def embed(self, image: NDArray[Any]) -> NDArray[np.float32]:
        with self.session._model.turns:
            return self.session.bring_back().embedding


def _box(corners: Sequence[Place]) -> tuple[Point, Point]:
    """Return two opposite corners as points; InputError if there is nothing between them."""
    (xa, ya), (xb, yb) = corners
    if xa == xb or ya == yb:
        raise InputError(f"a box has an area; got corners ({xa:g}, {ya:g}) and ({xb:g}, {yb:g}).")
    return (
        Point(min(xa, xb), min(ya, yb), FIRST_CORNER),
        Point(max(xa, xb), max(ya, yb), SECOND_CORNER),
    )
