"""Weights of a bundle's graphs in files beside them, each stored once.

Variants of a graph are the same weights in other operators, and ``memorize`` has the mask decoder
of ``decode``. So constants leave their graphs as ONNX's external data: those that the same graphs
have lie together in one file, named by its content. The files of a graph hold what it needs and no
more, and ONNX Runtime maps them into memory instead of reading them.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto, numpy_helper

from recallseg.engines.digest import digest_file
from recallseg.engines.manifest import data_files
from recallseg.engines.reading import naming
from recallseg.export.reading import Place, read_constants, read_graph
from recallseg.export.writing import entry, graph_file

__all__ = ["share_weights"]

_LEAST_TENSOR = 1 << 10
"""Bytes of a constant that leaves its graph; smaller ones are shapes and scales."""
_LEAST_FILE = 1 << 16
"""Bytes that a graph needs of a file at least; constants that come to fewer stay in the graph."""
_ALIGNMENT = 64
"""Constants begin at a multiple of it, as vector units like it."""

_Key = tuple[str, int]
"""SHA-256 of a constant, and its number among those of this content in its graph: each constant of
a graph has bytes of its own, so that no graph declares more than its files hold."""


def share_weights(folder: Path, graphs: MutableMapping[str, Any]) -> None:
    """Store the weights of a bundle's graphs once, in files beside them.

    Graphs whose weights lie there already stay as they are, to the byte, and others refer to their
    files: what was compiled or said of them stays in force.

    Parameters
    ----------
    folder : of the bundle, while it is written; its files are those of the manifest.
    graphs : the manifest's entries by ``VARIANT/PRECISION/GRAPH``; they are replaced.
    """
    before = _files(graphs)
    first: dict[str, str] = {}
    for key, value in graphs.items():
        first.setdefault(str(value["file"]), key)
    fresh = [f for f, key in first.items() if not isinstance(graphs[key].get("data"), list)]
    there: dict[_Key, Place] = {}
    for file in first.keys() - {*fresh}:
        there.update(_stored(folder / file))
    sizes = {file: _sizes(folder / file) for file in fresh}
    placed = {file: _refer(own, there) for file, own in sizes.items()}
    groups = _group({file: sizes[file].keys() - placed[file].keys() for file in fresh}, sizes)
    made: dict[str, tuple[Path, Path]] = {}
    for file in fresh:
        model = read_graph(folder / file)
        path = graph_file(folder, *first[file].split("/"))
        constants = dict(_constants(model))
        for members, shared in groups.items():
            if members[0] == file:  # what a group shares, each of its graphs has
                written = _write(path.parent, {key: constants[key] for key in shared})
                for member in members:
                    placed[member].update(written)
        for constant, place in placed[file].items():
            _move_out(constants[constant], place)
        made[file] = path.with_name(f"{path.name}.new"), path  # a graph yet to come may lie there
        made[file][0].write_bytes(model.SerializeToString(deterministic=True))
    entries = {}
    for file, (new, path) in made.items():
        os.replace(new, path)
        weights = sorted({place.file for place in placed[file].values()})
        data = [entry(folder, path.with_name(name)) for name in weights]
        entries[file] = {**entry(folder, path), "data": data}
    for key, value in graphs.items():
        graphs[key] = entries.get(str(value["file"]), value)
    _remove(folder, before - _files(graphs))


def _files(graphs: Mapping[str, Any]) -> set[str]:
    """Return the names of all files of these graphs."""
    return {str(file["file"]) for value in graphs.values() for file in (value, *data_files(value))}


def _constants(model: ModelProto) -> Iterator[tuple[_Key, TensorProto]]:
    """Yield constants that are large enough to leave; their bytes are in ``raw_data`` then."""
    seen: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.STRING:
            continue
        if not tensor.HasField("raw_data"):  # in a list of numbers
            raw = numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name)
            if len(raw.raw_data) < _LEAST_TENSOR:
                continue
            tensor.CopyFrom(raw)
        if len(tensor.raw_data) >= _LEAST_TENSOR:
            digest = hashlib.sha256(tensor.raw_data).hexdigest()
            yield (digest, seen[digest]), tensor
            seen[digest] += 1


def _sizes(path: Path) -> dict[_Key, int]:
    return {key: len(tensor.raw_data) for key, tensor in _constants(read_graph(path))}


def _stored(path: Path) -> Iterator[tuple[_Key, Place]]:
    """Yield where the constants of a graph lie that has them in files beside it."""
    seen: Counter[str] = Counter()
    for _, place, content in read_constants(path, read_graph(path, weights=False)):
        digest = hashlib.sha256(content).hexdigest()
        yield (digest, seen[digest]), place
        seen[digest] += 1


def _refer(sizes: Mapping[_Key, int], places: Mapping[_Key, Place]) -> dict[_Key, Place]:
    """Return where those of a graph's constants lie that are in files already."""
    found = {key: places[key] for key in sizes if key in places}
    needed: Counter[str] = Counter()
    for place in found.values():
        needed[place.file] += place.length
    return {key: place for key, place in found.items() if needed[place.file] >= _LEAST_FILE}


def _group(
    wanted: Mapping[str, Iterable[_Key]], sizes: Mapping[str, Mapping[_Key, int]]
) -> dict[tuple[str, ...], list[_Key]]:
    """Group constants by the graphs that have them; those of a group go into one file."""
    users: defaultdict[_Key, list[str]] = defaultdict(list)
    for file, keys in wanted.items():
        for key in keys:
            users[key].append(file)
    groups: defaultdict[tuple[str, ...], list[_Key]] = defaultdict(list)
    for key, files in users.items():
        groups[tuple(files)].append(key)
    return {
        files: sorted(keys)
        for files, keys in groups.items()
        if sum(sizes[files[0]][key] for key in keys) >= _LEAST_FILE
    }


def _write(folder: Path, constants: Mapping[_Key, TensorProto]) -> dict[_Key, Place]:
    """Write a file of constants and return where each lies."""
    unnamed = folder / "weights.new"
    offsets = {}
    with naming(unnamed), unnamed.open("wb") as file:
        for key, tensor in constants.items():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            offsets[key] = file.tell()
            file.write(tensor.raw_data)
    name = f"{digest_file(unnamed)[:16]}.weights"
    os.replace(unnamed, folder / name)
    return {
        key: Place(name, offset, len(constants[key].raw_data)) for key, offset in offsets.items()
    }


def _move_out(tensor: TensorProto, place: Place) -> None:
    """Let a constant refer to a file, in the place of its bytes."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (
        ("location", place.file),
        ("offset", str(place.offset)),
        ("length", str(place.length)),
    ):
        tensor.external_data.add(key=key, value=value)


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files that no graph needs any more, and folders that are empty then."""
    for name in names:
        path = folder / name
        path.unlink()
        for parent in path.parents:
            if parent == folder or any(parent.iterdir()):
                break
            parent.rmdir()
