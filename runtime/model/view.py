"""The image that is now on a model, and what it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.composition import Prompts
from recallseg.engines.errors import EngineRunError, InputError, StaleViewError
from recallseg.runtime.library.encoding import MEMORY_FORMATS
from recallseg.runtime.library.exemplar import StoredMemory
from recallseg.runtime.model.frame_memories import FrameMemories
from recallseg.runtime.model.preprocess import prepare_mask

if TYPE_CHECKING:
    from recallseg.runtime.model.kept_looks import Kept
    from recallseg.runtime.model.model import Model

__all__ = [
    "Corrected",
    "Finished",
    "Gather",
    "Refine",
    "Stored",
    "View",
    "Wanted",
    "groups",
]

Item = TypeVar("Item")

CONDITIONED = "conditioned"

Gather = Callable[[Sequence[StoredMemory], NDArray[Any], NDArray[np.float32]], None]
"""Copies stored memories to the host, as :meth:`Library.gather` does."""


class Wanted(NamedTuple):
    """One structure's part in a call of ``attend``: its position, and exemplars' memories."""

    position: int
    memories: Sequence[StoredMemory]


class Stored(NamedTuple):
    """How many memories there are to be recalled, and how they are stored."""

    number: int = 0
    memory_format: str = MEMORY_FORMATS[0]


Refine = Callable[
    [NDArray[np.float32], NDArray[np.float32]], tuple[NDArray[np.float32], list[bool]]
]
"""Makes of an image 1x3xHxW in 0..1 and all logits nxqxq those of m structures mxHxW, the first of
these n, and says which of them are too small to be there."""


class Finished(NamedTuple):
    """What comes out: n masks HxW, label map HxW, IoU estimates n, object scores n.

    ``small`` says which structures have no mask because so little of them is not believed.
    """

    masks: list[Any]
    label_map: Any
    iou: NDArray[np.float32]
    object_score: NDArray[np.float32]
    small: list[bool]


class Corrected(NamedTuple):
    """One structure, corrected: logits (S/4)x(S/4), IoU estimate, object score."""

    logits: NDArray[np.float32]
    iou: float
    object_score: float


class View:
    """The image that is on a model, until the next look. Made by :meth:`Model.look`.

    A question goes through :meth:`begin`; for each group of structures :meth:`recall`,
    :meth:`attend`, :meth:`decode`; then :meth:`finish`. Structures that are in no group come out as
    absent. Every method raises StaleViewError once another image is on the model.

    Attributes
    ----------
    shape : height and width of the image in pixels.
    question : how many were begun; see :meth:`plane`.
    """

    def __init__(
        self, model: Model, look: int, shape: tuple[int, int], graphs: Sequence[str]
    ) -> None:
        self.shape = shape
        self._model, self._look, self._graphs = model, look, graphs
        self._embedding: NDArray[np.float32] | None = None
        self._encoded = False
        self._n, self._k = 0, 0
        self._members: list[int] = []
        self._decoded: set[int] = set()
        self._refined: NDArray[np.float32] | None = None
        self.question = 0

    @property
    def valid(self) -> bool:
        """Whether its image is still the one on the model."""
        return self._look == self._model._looks and not self._model.closed

    @property
    def embedding(self) -> NDArray[np.float32]:
        """The embedding: D, of unit length."""
        with self._model.turns:
            self._check("embed" if self._embedding is None else "")
            if self._embedding is None:
                beside = "encode" in self._graphs and not self._encoded
                found, ran = self._model._embed(beside)
                length = float(np.linalg.norm(found))
                if not 0 < length < np.inf:
                    raise EngineRunError(
                        f"the engine gave an embedding of length {length}, expected 1. Check it "
                        "with 'recallseg verify', or use another precision or engine."
                    )
                self._embedding = found
                self._encoded |= ran
            return self._embedding

    def encode(self) -> None:
        """Make the image's features, if they are not there yet."""
        with self._model.turns:
            self._check("" if self._encoded else "encode")
            if not self._encoded:
                self._model._run("encode")
                self._encoded = True

    def begin(self, n: int) -> None:
        """Begin a question of n structures."""
        with self._model.turns:
            self._check()
            self._model._settle("question")
            self._n = n
            self._decoded.clear()
            self._refined = None
            self.question += 1

    def recall(
        self,
        gather: Gather,
        wanted: Sequence[Wanted],
        k: int,
        frames: FrameMemories | None = None,
    ) -> None:
        """Gather k memories for each structure of a group: its exemplars', then earlier frames'.

        Parameters
        ----------
        gather : copies exemplars' memories, see :meth:`recallseg.Library.gather`.
        wanted : the group, at most ``max_n`` of the bundle's geometry.
        frames : has k less the exemplars' memories, or more, of each structure.

        Raises
        ------
        EngineRunError
            If that is more than was reserved.
        """
        model, n = self._model, len(wanted)
        with model.turns:
            self._check()
            if not model._buffers.holds(n, k):
                raise EngineRunError(
                    f"{n} structures with {k} memories each are more than this model has room for. "
                    "Reserve it first: model.reserve(n, k, graphs=...)."
                )
            g = model.bundle.geometry
            tokens = model._buffers.part("memories", (n, k, g.tokens, g.memory_dim))
            pointers = model._buffers.part("pointers", (n, k, g.channels))
            model._recall(gather, [one.memories for one in wanted], tokens, pointers)
            for row, (position, stored) in enumerate(wanted):
                own = len(stored)
                if frames is not None and own < k:
                    frames.gather(position, tokens[row][own:], pointers[row][own:], model._copy)
            self._members, self._k = [one.position for one in wanted], k

    def attend(self) -> None:
        """Condition the features on what was recalled."""
        with self._model.turns:
            self._check()
            self.encode()
            self._model._run("attend", len(self._members), self._k)

    def decode(self) -> None:
        """Make the logits and scores of the group."""
        model, n = self._model, len(self._members)
        with model.turns:
            self._check()
            model._run("decode", n, self._k)
            made = model._buffers.of("decode", n, self._k)
            for name, every in (
                ("logits", "all_logits"),
                ("iou", "all_iou"),
                ("object_score", "all_scores"),
            ):
                found, target = made[name], model._buffers[every]
                for row, position in enumerate(self._members):
                    model._copy(target[position : position + 1], found[row : row + 1])
            self._decoded.update(self._members)

    def finish(
        self,
        out: tuple[Any, Any] = (None, None),
        *,
        n: int | None = None,
        refine: Refine | None = None,
    ) -> Finished:
        """Make masks and label map on the image's own grid; ends the question.

        Parameters
        ----------
        out : label map and masks to write into, or None; see :meth:`Segmenter.segment`.
        n : make those of the first n structures; None: of all.
        refine : makes logits on the image's own grid.
        """
        with self._model.turns:
            return self.finish_later(out, n=n, refine=refine)()

    def finish_later(
        self,
        out: tuple[Any, Any] = (None, None),
        *,
        n: int | None = None,
        refine: Refine | None = None,
    ) -> Callable[[], Finished]:
        """Do all of :meth:`finish` but the waiting; return what waits, and is called once.

        It needs no turn, and the view may be stale by then: the next image can be on its way.
        """
        model = self._model
        with model.turns:
            self._check()
            left_out = [row for row in range(self._n) if row not in self._decoded]
            if left_out:
                model._leave_out(left_out)
            wait, self._refined = model._finish(
                self._n if n is None else n,
                self._n,
                self.shape,
                out,
                None if refine is None else self._of_finite(refine),
            )
        return lambda: _checked(wait())

    def _of_finite(self, refine: Refine) -> Refine:
        """Refuse logits that are not finite, which a head takes for those that were not made."""
        decoded = sorted(self._decoded)

        def refined(
            planes: NDArray[np.float32], logits: NDArray[np.float32]
        ) -> tuple[NDArray[np.float32], list[bool]]:
            if not np.isfinite(logits[decoded]).all():
                raise EngineRunError(
                    "the engine gave logits that are not finite. Check it with 'recallseg "
                    "verify', or use another precision or engine."
                )
            return refine(planes, logits)

        return refined

    def plane(self, row: int, question: int) -> NDArray[np.float32]:
        """Return a copy of the logits that one mask of a question was made of.

        (S/4)x(S/4), or HxW where they were refined; NaN where none were made.

        Raises
        ------
        StaleViewError
            Also if another question was begun since.
        """
        with self._model.turns:
            self._check()
            if question != self.question:
                raise StaleViewError("another question was asked of this image since.")
            if self._refined is not None:
                plane: NDArray[np.float32] = self._refined[row].copy()
                return plane
            return self._model._fetch(self._model._buffers["all_logits"][row])

    def logits(self) -> NDArray[np.float32]:
        """Return a copy of the question's logits, nx(S/4)x(S/4); NaN where none were made."""
        with self._model.turns:
            self._check()
            return self._model._fetch(self._model._buffers["all_logits"][: self._n])

    def memorize(self, masks: Sequence[Any]) -> tuple[Any, Any]:
        """Make memories of masks HxW, as many as one call takes (``max_n``) at most.

        Returns
        -------
        memories, pointers : nxTx64 and nxC float32 where the model runs; the next call replaces
            them.
        """
        model, n = self._model, len(masks)
        with model.turns:
            self._check()
            self.encode()
            planes = model._masks(n)
            for plane, mask in zip(planes[:, 0], masks, strict=True):
                prepare_mask(mask if isinstance(mask, np.ndarray) else model._fetch(mask), plane)
            model._memorize(planes)
            made = model._buffers.of("memorize", n)
            return made["memories"], made["pointers"]

    def remember(self, frames: FrameMemories, masks: Mapping[int, Any]) -> None:
        """Add memories of this image's masks HxW, by position of the structure, to ``frames``."""
        model = self._model
        with model.turns:
            for group in groups(list(masks), model.bundle.geometry.max_n):
                memories, pointers = self.memorize([masks[position] for position in group])
                for row, position in enumerate(group):
                    frames.add(position, memories[row], pointers[row], model._copy)

    def keep(self, structures: int | None = None) -> Kept:
        """Copy out what the image has become, so that :meth:`Model.put` can bring it back.

        It stays where the model runs: :attr:`Kept.nbytes`, 17 MB at 1024 px. Of all kept
        looks, the least recently used go when they take more than the model's ``keep_bytes``.

        Parameters
        ----------
        structures : room for the conditioned features of so many structures beside (4 MB each at
            1024 px), see :meth:`keep_conditioned`, and for those of one of which nothing is
            recalled; None for none of it.

        Raises
        ------
        InputError
            If ``keep_bytes`` is less than one takes.
        HostMemoryError, DeviceMemoryError
        """
        model = self._model
        with model.turns:
            embedding = self.embedding if "embed" in self._graphs else self._embedding
            self.encode()
            kept, tensors = model._kept.take(model, self.shape, embedding, structures)
            for name, tensor in tensors.items():
                if name != CONDITIONED:
                    model._copy(tensor, model._buffers[name])
            if structures is not None:
                # Where nothing is recalled SAM 2 adds one vector to the features.
                plain = model._fetch(model._buffers["features"])
                plain += np.asarray(model.bundle.no_memory, np.float32)[:, None, None]
                model._write(tensors[CONDITIONED][structures : structures + 1], plain)
            return kept

    def keep_conditioned(self, kept: Kept) -> Sequence[int]:
        """Copy out the conditioned features of the group that was attended to last.

        Returns
        -------
        the positions of its structures.
        """
        model = self._model
        with model.turns:
            self._check()
            made = model._buffers.of("attend", len(self._members), self._k)[CONDITIONED]
            target = model._kept.find(kept)[CONDITIONED]
            for row, position in enumerate(self._members):
                model._copy(target[position : position + 1], made[row : row + 1])
            return tuple(self._members)

    def correct(self, kept: Kept, position: int, prompts: Prompts) -> Corrected:
        """Decode one structure with what a person said of it.

        Parameters
        ----------
        kept : this image's, with conditioned features.
        position : of the structure among them; their count for one of which nothing is recalled.
        prompts : points and the mask before.
        """
        model = self._model
        with model.turns:
            self._check()
            model._settle("question")
            tensors = model._buffers.of("decode")
            source = model._kept.find(kept)[CONDITIONED]
            model._copy(tensors[CONDITIONED], source[position : position + 1])
            model._composition.run("correct", {**tensors, **model._place_prompts(vars(prompts))})
            logits, iou, score = (
                model._fetch(tensors[name])[0] for name in ("logits", "iou", "object_score")
            )
            if not (np.isfinite(logits).all() and np.isfinite([iou, score]).all()):
                raise EngineRunError(
                    "the engine gave a corrected mask with numbers that are not finite. Use "
                    "another precision or engine."
                )
            return Corrected(logits, float(iou), float(score))

    def _check(self, graph: str = "") -> None:
        self._model._begin_turn()
        if self._look != self._model._looks:
            raise StaleViewError(
                "this view is stale: another image is on the model now. Look at the image again, "
                "or keep the view (view.keep()) and put it back (model.put(kept))."
            )
        if graph and graph not in self._graphs:
            raise InputError(
                f"'{graph}' was not asked for in this look: model.look(image, intensity, graphs)."
            )

    def __repr__(self) -> str:
        state = "valid" if self.valid else "stale"
        return f"View({self.shape[0]}x{self.shape[1]}, {state})"


def _checked(found: Finished) -> Finished:
    if not (np.isfinite(found.iou).all() and np.isfinite(found.object_score).all()):
        raise EngineRunError(
            f"the engine gave IoU estimates {found.iou.tolist()} and object scores "
            f"{found.object_score.tolist()}: numbers that are not finite. Use another precision or "
            "engine."
        )
    return found


def groups(items: Sequence[Item], most: int) -> Iterator[Sequence[Item]]:
    """Yield items in groups of at most ``most``; of none there are none."""
    for start in range(0, len(items), max(1, most)):
        yield items[start : start + most]
