"""Reading graphs with their weights, so that an error of the system says which file.

ONNX's own loader opens a file of weights anew for each constant, and where it cannot, names that
constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import ModelProto, TensorProto

from recallseg.engines.errors import ExportError
from recallseg.engines.reading import naming

__all__ = ["Place", "read_constants", "read_graph"]


@dataclass(frozen=True)
class Place:
    """Bytes of a file beside the graph."""

    file: str
    offset: int
    length: int


def read_graph(path: Path, *, weights: bool = True) -> ModelProto:
    """Return a graph, its weights with it wherever they lie; or without those in other files.

    Raises
    ------
    ExportError
        If a file of weights ends too early.
    OSError
        If a file cannot be read; it has its name.
    """
    with naming(path):
        model = onnx.load(path, load_external_data=False)
    if not weights:
        return model
    for constant, _, content in read_constants(path, model):
        constant.raw_data = content
        constant.data_location = TensorProto.DEFAULT
        constant.ClearField("external_data")
    return model


def read_constants(path: Path, model: ModelProto) -> Iterator[tuple[TensorProto, Place, bytes]]:
    """Yield the constants of a graph that lie in files beside it, where, and their bytes.

    Parameters
    ----------
    path : of the graph's file.
    model : the graph, without these weights; what is yielded of it may be changed.

    Raises
    ------
    ExportError
        If a file of weights ends too early.
    OSError
        If one cannot be read; it has its name.
    """
    with ExitStack() as files:
        opened: dict[str, BinaryIO] = {}
        for constant in model.graph.initializer:
            if constant.data_location != TensorProto.EXTERNAL:
                continue
            said = {entry.key: entry.value for entry in constant.external_data}
            place = Place(said["location"], int(said["offset"]), int(said["length"]))
            weights = path.with_name(place.file)
            with naming(weights):
                if place.file not in opened:
                    opened[place.file] = files.enter_context(weights.open("rb"))
                opened[place.file].seek(place.offset)
                content = opened[place.file].read(place.length)
            if len(content) != place.length:
                raise ExportError(
                    f"{weights} is cut off: weights in it end at byte "
                    f"{place.offset + place.length:,}. Export the bundle again."
                )
            yield constant, place, content
