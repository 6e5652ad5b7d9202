"""A tiny bundle on disk for the fake engine: the whole pipeline without weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from recallseg.engines.bundle import (
    FORMAT,
    FORMAT_VERSION,
    Bundle,
    Description,
    MemorySemantics,
    Normalisation,
    Weights,
)
from recallseg.engines.composition import Composition
from recallseg.engines.digest import digest_file
from recallseg.engines.engine import Engine
from recallseg.engines.fake import FakeEngine
from recallseg.engines.golden import GoldenTensors, make_case, run_case
from recallseg.engines.specs import GRAPHS, Geometry, GraphSpec, graph_specs

__all__ = ["fake_geometry", "make_fake_bundle", "write_bundle"]

STRIDE = 16


def fake_geometry(
    image_size: int = 64,
    *,
    max_k: int = 32,
    max_n: int = 16,
    tokens: int = 0,
    memory_grid: tuple[int, int] = (0, 0),
) -> Geometry:
    """Return a small geometry with every ratio that SAM 2's has."""
    return Geometry(
        image_size=image_size,
        embed_size=28,
        embedding_dim=48,
        channels=8,
        feature_size=image_size // STRIDE,
        skip0_channels=2,
        skip1_channels=4,
        memory_dim=4,
        tokens=tokens,
        memory_grid=memory_grid,
        max_k=max_k,
        max_n=max_n,
    )


def empty_graph(producer: str) -> bytes:
    """Return an ONNX model without a node: fields 2 (producer's name) and 7 (graph)."""
    return b"\x12" + bytes([len(producer)]) + producer.encode() + b"\x3a\0"


def make_fake_bundle(
    path: Path,
    image_size: int = 64,
    *,
    name: str = "fake",
    source: str = "random",
    weights_digest: str = "0" * 64,
    object_pointers: bool = True,
    max_k: int = 32,
    max_n: int = 16,
    tokens: int = 0,
    memory_grid: tuple[int, int] = (0, 0),
    former: Sequence[tuple[str, str]] = (),
    correct: bool = False,
) -> Bundle:
    """Write a bundle folder for the engine ``fake`` and open it.

    Parameters
    ----------
    path : folder to make.
    image_size : a multiple of 16; masks come back on a grid of ``image_size / 16`` cells.
    source : where the weights claim to come from (``pretrained``, ``demo``, ``random``).
    weights_digest : another one gives another bundle identity.
    tokens, memory_grid : of a memory; one token for each place of the feature map by default.
    correct : whether it has the optional graph ``correct``.
    former : digests of the segmenter's and embedder's weights under which it is known too.
    """
    geometry = fake_geometry(
        image_size, max_k=max_k, max_n=max_n, tokens=tokens, memory_grid=memory_grid
    )
    content = {
        graph: empty_graph(f"the fake engine never reads {graph}")
        for graph in (*GRAPHS, *(("correct",) if correct else ()))
    }
    return write_bundle(
        path,
        geometry,
        content,
        FakeEngine,
        name=name,
        source=source,
        weights_digest=weights_digest,
        object_pointers=object_pointers,
        former=former,
    )


def write_bundle(
    path: Path,
    geometry: Geometry,
    content: Mapping[str, bytes],
    engine: Callable[[GraphSpec, Path], Engine],
    *,
    name: str = "fake",
    source: str = "random",
    weights_digest: str = "0" * 64,
    object_pointers: bool = True,
    former: Sequence[tuple[str, str]] = (),
) -> Bundle:
    """Write a bundle folder with these graphs and what ``engine`` makes of them, and open it.

    Parameters
    ----------
    path : folder to make.
    content : each graph's file, of the portable variant in fp32.
    source, weights_digest, former : see :func:`make_fake_bundle`.
    """
    weights = {
        network: Weights(f"fake-{network}", source, weights_digest, "Apache-2.0")
        for network in ("segmenter", "embedder")
    }
    normalisation = {
        graph: Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)) for graph in ("embed", "encode")
    }
    memory = MemorySemantics(object_pointers, 0.25)
    specs = graph_specs(geometry, object_pointers=object_pointers, optional=("correct",))
    graphs, engines = {}, {}
    for graph, data in content.items():
        file = Path("graphs", "portable", "fp32", f"{graph}.onnx")
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(data)
        graphs[f"portable/fp32/{graph}"] = {
            "file": file.as_posix(),
            "sha256": digest_file(path / file),
        }
        engines[graph] = engine(specs[graph], path / file)
    case = make_case(seed=1)
    outputs = run_case(case, Composition(engines), geometry, normalisation, memory)
    golden = Path("golden", "golden.npz")
    (path / golden).parent.mkdir(exist_ok=True)
    GoldenTensors.from_run(case, outputs, seed=2).save(path / golden)
    described = Description(
        (weights_digest, weights_digest),
        geometry,
        normalisation,
        memory,
        (0.5,) * geometry.channels,
    )
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "name": name,
        "weights": {network: vars(value) for network, value in weights.items()},
        "geometry": geometry.to_json(),
        "normalisation": {graph: vars(value) for graph, value in normalisation.items()},
        "memory": vars(memory),
        "no_memory": described.no_memory,
        "identity": described.identity,
        "former_identities": [
            {"identity": described.former(*pair), "segmenter": pair[0], "embedder": pair[1]}
            for pair in former
        ],
        "graphs": graphs,
        "golden": {"file": golden.as_posix(), "sha256": digest_file(path / golden)},
    }
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return Bundle.open(path)
