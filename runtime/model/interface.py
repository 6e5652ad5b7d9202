"""The interface between a segmenter, which decides, and where its tensors lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.device import Device
from recallseg.runtime.library.exemplar import StoredMemory
from recallseg.runtime.model.frame_memories import TemporalMemories

__all__ = ["Finished", "GpuOptions", "Query", "Wanted"]


@dataclass(frozen=True)
class GpuOptions:
    """How a segmenter uses a GPU.

    Attributes
    ----------
    device : from :func:`recallseg.engines.device.open_device`, whose stream (a caller's own, say)
        everything is queued on; None opens the first GPU.
    cuda_graphs : record each graph's work, and replay it.
    cache_bytes : most bytes of recalled memories that stay on the device; the least recently used
        ones go first.
    """

    device: Device | None = None
    cuda_graphs: bool = False
    cache_bytes: int = 256 << 20


class Wanted(NamedTuple):
    """One structure's part in a call of ``attend``: its position, and exemplars' memories."""

    position: int
    memories: Sequence[StoredMemory]


class Finished(NamedTuple):
    """What comes out: n masks HxW, label map HxW, IoU estimates n, object scores n."""

    masks: list[Any]
    label_map: Any
    iou: NDArray[np.float32]
    object_score: NDArray[np.float32]


class Query(ABC):
    """Engines and buffers of one segmenter, for one query at a time.

    A query calls :meth:`prepare`, :meth:`embed`, :meth:`encode`; then, for each group of
    structures, :meth:`recall`, :meth:`attend`, :meth:`decode`; then :meth:`finish`. Structures that
    are in no group come out as absent.

    Attributes
    ----------
    workspace : the buffers, with their size in bytes as ``nbytes``.
    group : most structures of one call of ``attend``.
    device : where it runs; None is the CPU.
    """

    workspace: Any
    group: int
    device: Device | None = None

    @abstractmethod
    def check(self, image: Any) -> Any:
        """Return a caller's image HxW or HxWx3 as something to prepare.

        Raises
        ------
        InputError
            For what cannot be taken, see :func:`recallseg.runtime.checks.check_image`.
        """

    @abstractmethod
    def prepare(self, image: Any, *graphs: str) -> None:
        """Make the inputs of ``embed``, ``encode`` or both; begins a query."""

    @abstractmethod
    def embed(self) -> NDArray[np.float32]:
        """Return the embedding, D; it is valid until the next query."""

    @abstractmethod
    def encode(self) -> None:
        """Make the features of the image."""

    @abstractmethod
    def recall(self, wanted: Sequence[Wanted], k: int, temporal: TemporalMemories | None) -> None:
        """Gather k memories for each structure of a group: its exemplars', then earlier frames'."""

    @abstractmethod
    def attend(self) -> None:
        """Condition the features on what was recalled."""

    @abstractmethod
    def decode(self) -> None:
        """Make the logits and scores of the group."""

    @abstractmethod
    def finish(self, shape: tuple[int, int], out: tuple[Any, Any]) -> Finished:
        """Make masks and label map on the image's own grid; ends a query.

        Parameters
        ----------
        out : label map and masks to write into, or None; see :meth:`Segmenter.segment`.
        """

    @abstractmethod
    def memorize(
        self,
        masks: NDArray[np.float32],
        memories: NDArray[np.float32],
        pointers: NDArray[np.float32],
    ) -> None:
        """Make memories nxTx64 and pointers nxC of the image last encoded with masks nx1xSxS."""

    @abstractmethod
    def logits(self) -> NDArray[np.float32]:
        """Return the logits of the last query, nx(S/4)x(S/4)."""
