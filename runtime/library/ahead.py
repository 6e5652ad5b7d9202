"""Many images encoded at once, in their order: as many as the encoder's model has lanes for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from recallseg.runtime.library.binding import lanes_of
from recallseg.runtime.library.encoding import Encoded, ExemplarEncoder

__all__ = ["encode_ahead"]

_One = TypeVar("_One")
Picture = Callable[[_One], tuple[NDArray[Any], Mapping[str, NDArray[np.bool_]]]]


def encode_ahead(
    encoder: ExemplarEncoder, exemplars: Iterable[_One], count: int, picture: Picture[_One]
) -> Generator[tuple[_One, Encoded], None, None]:
    """Yield each exemplar with what the encoder makes of it, in their order.

    Close the generator if it is not exhausted: what runs ahead ends then.

    Parameters
    ----------
    exemplars : taken by the thread that iterates, at most one more than are encoded at once.
    count : how many there are.
    picture : gives the image HxW or HxWx3 of one, and a mask HxW for each structure.
    """
    with lanes_of(encoder, count) as lanes:
        if len(lanes) == 1:
            for one in exemplars:
                yield one, lanes[0].encode(*picture(one))
            return
        free: SimpleQueue[ExemplarEncoder] = SimpleQueue()
        for lane in lanes:
            free.put(lane)

        def encode(one: _One) -> Encoded:
            lane = free.get()
            try:
                return lane.encode(*picture(one))
            finally:
                free.put(lane)

        waiting: deque[tuple[_One, Future[Encoded]]] = deque()
        with ThreadPoolExecutor(len(lanes)) as pool:
            try:
                for one in exemplars:
                    waiting.append((one, pool.submit(encode, one)))
                    if len(waiting) > len(lanes):
                        first, encoded = waiting.popleft()
                        yield first, encoded.result()
                while waiting:
                    first, encoded = waiting.popleft()
                    yield first, encoded.result()
            finally:
                for _, encoded in waiting:
                    encoded.cancel()
