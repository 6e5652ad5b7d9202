"""What images became that are not on the model now, kept to be put back."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.buffer_shapes import bytes_of
from recallseg.engines.errors import InputError, StaleViewError
from recallseg.runtime.model.view import Stored

if TYPE_CHECKING:
    from recallseg.runtime.model.model import Model

__all__ = ["Kept", "KeptLooks"]

_Tensors = dict[str, Any]


class Kept:
    """What an image became, copied out by :meth:`View.keep`; brought back by :meth:`Model.put`.

    Its room is given back by :meth:`close`, or when nothing refers to it any more.

    Attributes
    ----------
    model : where it can be put.
    shape : height and width of the image.
    embedding : D of unit length, or None if it was not asked for.
    nbytes : what it takes.
    """

    def __init__(
        self,
        model: Model,
        shape: tuple[int, int],
        embedding: NDArray[np.float32] | None,
        nbytes: int,
    ) -> None:
        self.model, self.shape, self.embedding, self.nbytes = model, shape, embedding, nbytes

    def close(self) -> None:
        """Give its room back; it cannot be put any more."""
        self.model._kept.drop(id(self))


class KeptLooks:
    """A bounded pool of kept looks, the least recently used of which goes first.

    Parameters
    ----------
    most : bytes that may be held.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[int, _Tensors] = OrderedDict()  # by the id of a Kept
        self._free: list[_Tensors] = []

    def take(
        self,
        model: Model,
        shape: tuple[int, int],
        embedding: NDArray[np.float32] | None,
        structures: int | None,
    ) -> tuple[Kept, _Tensors]:
        """Return a new one and the tensors that it consists of."""
        shapes = model._kept_shapes(structures)
        size = bytes_of(shapes)
        if size > self._most:
            raise InputError(
                f"a kept look takes {size / 2**20:.1f} MiB, and this model may keep "
                f"{self._most / 2**20:.1f} MiB. Open it with larger keep_bytes."
            )
        while (tensors := self._reuse(size)) is None:
            if self.nbytes + size <= self._most:
                model._require(shapes, 0, Stored(), (), "A kept look")
                tensors = {name: model._allocate(one) for name, one in shapes.items()}
                break
            if self._free:
                self._free.pop(0)  # of another size
            else:
                self.drop(next(iter(self._held)))
        kept = Kept(model, shape, embedding, size)
        self._held[id(kept)] = tensors
        weakref.finalize(kept, self.drop, id(kept))
        return kept, tensors

    def _reuse(self, size: int) -> _Tensors | None:
        """Return tensors that nobody holds any more, of this many bytes in all; None: none are."""
        for position, tensors in enumerate(self._free):
            if _bytes(tensors) == size:
                return self._free.pop(position)
        return None

    def __contains__(self, kept: Kept) -> bool:
        return id(kept) in self._held

    def find(self, kept: Kept) -> _Tensors:
        """Return its tensors."""
        tensors = self._held.get(id(kept))
        if tensors is None:
            raise StaleViewError(
                f"this kept look was dropped: the model keeps {self._most / 2**20:.0f} MiB of "
                "them, and more were kept since (or it was closed). Look at the image again, or "
                "open the model with larger keep_bytes."
            )
        self._held.move_to_end(id(kept))
        return tensors

    def drop(self, name: int) -> None:
        """Give one's tensors back. Runs whenever the interpreter likes: it takes no lock."""
        tensors = self._held.pop(name, None)
        if tensors is not None:
            self._free.append(tensors)

    def clear(self) -> None:
        """Drop all, and their tensors."""
        self._held.clear()
        self._free.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(map(_bytes, (*self._held.values(), *self._free)))


def _bytes(tensors: _Tensors) -> int:
    return sum(int(tensor.nbytes) for tensor in tensors.values())
