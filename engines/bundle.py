"""A bundle: the folder with all graphs of one pair of models, and the manifest that describes it.

::

    BUNDLE/
      manifest.json                              format, identity, weights, sizes, digests, parity
      graphs/VARIANT/PRECISION/{embed,...}.onnx  VARIANT "portable" is the reference for all
      golden/golden.npz                          inputs and outputs that any engine must reproduce
      licences/                                  of the weights

The manifest is the contract between export and runtime: neither imports the other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from recallseg.engines.digest import digest_json, digest_stream
from recallseg.engines.errors import BundleError
from recallseg.engines.graph_check import check_graph
from recallseg.engines.inside import open_inside
from recallseg.engines.manifest import MANIFEST, read_manifest
from recallseg.engines.paths import SHIPPED, shipped_bundles
from recallseg.engines.specs import GRAPHS, Geometry, GraphSpec, graph_specs

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "Bundle",
    "MemorySemantics",
    "Normalisation",
    "Weights",
    "bundle_identity",
]

FORMAT = "recallseg-bundle"
FORMAT_VERSION = 1
NOTICES = {
    "pretrained": "",
    "demo": "demo model, not for clinical use",
    "random": "RANDOM WEIGHTS: the masks mean nothing, only the timings do",
}
"""What every output says of the weights it was made with, by the weights' source."""


@dataclass(frozen=True)
class Weights:
    """Where one network's weights came from.

    ``source`` is ``pretrained``, ``demo`` or ``random``; ``digest`` is over names, shapes and
    values of all tensors, so the same weights in another file format are the same weights.
    """

    architecture: str
    source: str
    digest: str
    licence: str


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation (RGB) of an image scaled to 0..1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class MemorySemantics:
    """How recalled memories enter memory attention.

    Attributes
    ----------
    object_pointers : whether ``attend`` takes object pointers beside the memory tokens.
    pointer_time : the one time code given to every recalled exemplar, in SAM 2's unit: frames
        between query and exemplar, divided by the most pointers less one. Exemplars have no time,
        so it is a choice (PITFALLS 19).
    """

    object_pointers: bool
    pointer_time: float


def bundle_identity(
    sam2: Weights,
    dinov2: Weights,
    geometry: Geometry,
    normalisation: Mapping[str, Normalisation],
    memory: MemorySemantics,
) -> str:
    """Digest of what decides which embeddings and memories come out: not of the manifest file.

    Adding a variant or a precision does not change it, so libraries stay valid. ``max_k`` and
    ``max_n`` are limits of graphs, not of meaning, and stay out too.
    """
    sizes = {
        name: size for name, size in geometry.to_json().items() if name not in ("max_k", "max_n")
    }
    return digest_json(
        {
            "weights": [sam2.digest, dinov2.digest],
            "geometry": sizes,
            "normalisation": {
                name: [list(value.mean), list(value.std)] for name, value in normalisation.items()
            },
            "memory": [memory.object_pointers, memory.pointer_time],
        }
    )


class Bundle:
    """An opened bundle. Graph files are checked against their digests when they are asked for.

    Attributes
    ----------
    path : the folder.
    name : what the bundle calls itself.
    identity : digest of weights, geometry, normalisation and memory semantics.
    sam2, dinov2 : where the weights came from.
    geometry, normalisation, memory : what preprocessing and composition need.
    notice : what every result must say of the weights; empty for pretrained ones.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        try:
            self.name = str(manifest["name"])
            self.sam2 = Weights(**manifest["weights"]["sam2"])
            self.dinov2 = Weights(**manifest["weights"]["dinov2"])
            self.geometry = Geometry.from_json(manifest["geometry"])
            self.normalisation = {
                graph: Normalisation(tuple(value["mean"]), tuple(value["std"]))
                for graph, value in manifest["normalisation"].items()
            }
            self.memory = MemorySemantics(**manifest["memory"])
            self.identity = str(manifest["identity"])
            self._graphs: Mapping[str, Mapping[str, Any]] = manifest["graphs"]
            self._golden: Mapping[str, Any] = manifest["golden"]
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(
                f"the manifest of bundle {path} is incomplete: {error!r}. Export the bundle again."
            ) from error
        computed = bundle_identity(
            self.sam2, self.dinov2, self.geometry, self.normalisation, self.memory
        )
        if computed != self.identity:
            raise BundleError(
                f"the manifest of bundle {path} was changed: it states identity "
                f"{self.identity[:12]}, its contents give {computed[:12]}. Restore it, or export "
                "it again."
            )

    @classmethod
    def open(cls, source: str | Path | Bundle) -> Bundle:
        """Open a folder, or a shipped bundle by its name (``"demo"``).

        Raises
        ------
        BundleError
            If there is no such bundle, its manifest cannot be read, or its format is newer.
        """
        if isinstance(source, Bundle):
            return source
        path = Path(source)
        file = path / MANIFEST
        if str(source) in shipped_bundles():
            shipped = SHIPPED / str(source)
            if isinstance(source, str) and os.path.lexists(file):
                raise BundleError(
                    f"'{source}' is the shipped bundle {shipped} and the folder {path.absolute()} "
                    f"too. Say which: './{source}', or the path of the shipped one."
                )
            if not path.exists() or isinstance(source, str):
                path, file = shipped, shipped / MANIFEST
        if not os.path.lexists(file):
            names = ", ".join(shipped_bundles())
            raise BundleError(
                f"no bundle at '{source}': {file} does not exist. Give a folder made by "
                f"'recallseg export'{f', or one of: {names}' if names else ''}."
            )
        manifest = read_manifest(path)
        if manifest.get("format") != FORMAT:
            raise BundleError(f"{file} is not the manifest of a RecallSeg bundle.")
        version = manifest.get("version")
        if version != FORMAT_VERSION:
            raise BundleError(
                f"bundle {path} has format version {version!r}; this RecallSeg reads version "
                f"{FORMAT_VERSION}. Update RecallSeg, or export the bundle again."
            )
        return cls(path, manifest)

    @property
    def notice(self) -> str:
        """What outputs made with these weights must say (empty for pretrained weights)."""
        sources = {self.sam2.source, self.dinov2.source}
        for source in ("random", "demo"):
            if source in sources:
                return NOTICES[source]
        return NOTICES["pretrained"]

    @cached_property
    def specs(self) -> dict[str, GraphSpec]:
        """The five graph specs for this geometry."""
        return graph_specs(self.geometry, object_pointers=self.memory.object_pointers)

    @property
    def precisions(self) -> dict[str, tuple[str, ...]]:
        """Precisions on disk by variant, e.g. ``{"portable": ("fp32",)}``."""
        found: dict[str, list[str]] = {}
        for key in self._graphs:
            variant, precision, _ = key.split("/")
            precisions = found.setdefault(variant, [])
            if precision not in precisions:
                precisions.append(precision)
        return {variant: tuple(precisions) for variant, precisions in found.items()}

    def graph_file(self, graph: str, variants: Sequence[str], precision: str) -> tuple[Path, str]:
        """Return path and variant of the first of ``variants`` that has ``graph`` in ``precision``.

        The file is read once to compare it with its digest, and looked at: see ``graph_check``.

        Raises
        ------
        BundleError
            If no variant has it, the file is missing or was changed, or the graph is more than a
            network of tensors.
        """
        if graph not in GRAPHS:
            raise BundleError(f"there is no graph '{graph}'; the graphs are {', '.join(GRAPHS)}.")
        for variant in variants:
            entry = self._graphs.get(f"{variant}/{precision}/{graph}")
            if entry is not None:
                path = self._checked(entry)
                data = entry.get("data")
                check_graph(path, None if data is None else self.path / str(data["file"]))
                return path, variant
        raise BundleError(
            f"bundle {self.name} has no graph '{graph}' in precision '{precision}' for "
            f"{' or '.join(variants)}; it has {self.precisions}. Choose one of these."
        )

    def graph_digest(self, graph: str, variant: str, precision: str) -> str:
        """Digest of a graph's file and of the weights beside it, as the manifest states them."""
        entry = self._graphs[f"{variant}/{precision}/{graph}"]
        data = entry.get("data")
        return digest_json([entry["sha256"], data["sha256"] if data else None])

    @property
    def golden_digest(self) -> str:
        """SHA-256 of the golden tensors, as the manifest states it."""
        return str(self._golden["sha256"])

    @property
    def golden_file(self) -> Path:
        """The checked file with golden tensors; raises BundleError if missing or changed."""
        return self._checked(self._golden)

    def _checked(self, entry: Mapping[str, Any]) -> Path:
        name = str(entry["file"])
        path = self.path / name
        if "data" in entry:  # weights beyond 2 GiB lie in a file of their own
            self._checked(entry["data"])
        try:
            with os.fdopen(open_inside(self.path, name), "rb") as file:
                digest = digest_stream(file)
        except FileNotFoundError:
            raise BundleError(
                f"bundle {self.name} lacks {name}. Export or copy it again."
            ) from None
        except OSError as error:
            raise BundleError(f"{path} of bundle {self.name}: {error.strerror}.") from error
        if digest != entry["sha256"]:
            raise BundleError(
                f"{path} was changed or damaged: SHA-256 {digest[:12]}, the manifest states "
                f"{str(entry['sha256'])[:12]}. Restore it or export the bundle again."
            )
        return path

    def __repr__(self) -> str:
        g = self.geometry
        return (
            f"Bundle({self.name!r}, {self.sam2.architecture} at {g.image_size} px, "
            f"{self.dinov2.architecture} at {g.embed_size} px, weights {self.sam2.source}, "
            f"identity {self.identity[:12]})"
        )
