"""A query on the CPU: numpy arrays from end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.composition import Composition, Prediction, Recall
from recallseg.engines.engine import EngineOptions
from recallseg.engines.registry import load_engines
from recallseg.runtime.checks import check_image
from recallseg.runtime.library import Library
from recallseg.runtime.model.frame_memories import TemporalMemories
from recallseg.runtime.model.interface import Finished, Query, Wanted
from recallseg.runtime.model.postprocess import finish_masks
from recallseg.runtime.model.preprocess import prepare_image
from recallseg.runtime.model.workspace import Workspace
from recallseg.runtime.segmenting.presence import ABSENT_SCORE

__all__ = ["HostQuery"]


class HostQuery(Query):
    """See :class:`Query` and :func:`recallseg.runtime.model.query.open_query`."""

    workspace: Workspace

    def __init__(
        self,
        library: Library,
        structures: Sequence[str],
        k: int,
        engine: str,
        precision: str,
        graphs: tuple[str, ...],
        threads: int | None,
    ) -> None:
        self._library, self._bundle = library, library.bundle
        self._composition = Composition(
            load_engines(
                self._bundle, engine, precision, options=EngineOptions(threads), graphs=graphs
            )
        )
        self.workspace = Workspace(
            self._bundle.geometry, self._bundle.memory, n=len(structures), k=k
        )
        self.group = self.workspace.group
        self._iou = np.zeros(len(structures), np.float32)
        self._object_score = np.zeros(len(structures), np.float32)
        self._members: list[int] = []
        self._recall: Recall
        self._prediction: Prediction

    def check(self, image: Any) -> NDArray[Any]:
        return check_image(image)

    def prepare(self, image: NDArray[Any], *graphs: str) -> None:
        w = self.workspace
        inputs = {"embed": w.embed_image, "encode": w.encode_image}
        targets = [(inputs[name], self._bundle.normalisation[name]) for name in graphs]
        prepare_image(image, self._library.intensity, w.pixels, *targets)
        self._iou[:], self._object_score[:] = 0.0, ABSENT_SCORE

    def embed(self) -> NDArray[np.float32]:
        w = self.workspace
        self._composition.embed(w.embed_image, w.embedding)
        embedding: NDArray[np.float32] = w.embedding[0]
        return embedding

    def encode(self) -> None:
        self._composition.encode(self.workspace.encode_image, self.workspace.features)

    def recall(self, wanted: Sequence[Wanted], k: int, temporal: TemporalMemories | None) -> None:
        w, n = self.workspace, len(wanted)
        self._members = [one.position for one in wanted]
        self._recall, self._prediction = w.recall_for(n, k), w.prediction_for(n)
        for row, (position, stored) in enumerate(wanted):
            memories, pointers = self._recall.memories[row], self._recall.pointers[row]
            count = len(stored)
            self._library.gather(stored, memories[:count], pointers[:count])
            if temporal is not None:
                temporal.gather(position, memories[count:], pointers[count:])

    def attend(self) -> None:
        self._composition.attend(self.workspace.features, self._recall, self._prediction)

    def decode(self) -> None:
        found = self._prediction
        self._composition.decode(self.workspace.features, found)
        self.workspace.logits[self._members] = found.logits
        self._iou[self._members] = found.iou
        self._object_score[self._members] = found.object_score

    def finish(self, shape: tuple[int, int], out: tuple[Any, Any]) -> Finished:
        w = self.workspace
        present = [bool(score > 0) for score in self._object_score]
        masks, label_map = finish_masks(w.logits, present, shape, w.pixels, out)
        return Finished([*masks], label_map, self._iou, self._object_score)

    def memorize(
        self,
        masks: NDArray[np.float32],
        memories: NDArray[np.float32],
        pointers: NDArray[np.float32],
    ) -> None:
        self._composition.memorize(self.workspace.features, masks, memories, pointers)

    def logits(self) -> NDArray[np.float32]:
        return self.workspace.logits
