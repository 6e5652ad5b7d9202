"""A bundle: the folder with all graphs of one pair of models, and the manifest that describes it.

::

    BUNDLE/
      manifest.json                            format, identity, weights, sizes, digests, parity
      graphs/VARIANT.PRECISION.{embed,...}.onnx  VARIANT "portable" is the reference for all
      graphs/DIGEST.weights                    what one or more graphs have as constants
      golden/golden.npz                        inputs and outputs that any engine must reproduce
      licences/                                of the weights

The manifest is the contract between export and runtime: neither imports the other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from recallseg.engines.digest import digest_json, digest_stream
from recallseg.engines.errors import BundleError
from recallseg.engines.graph_check import check_graph
from recallseg.engines.inside import open_inside
from recallseg.engines.manifest import MANIFEST, data_files, read_manifest
from recallseg.engines.paths import SHIPPED, shipped_bundles
from recallseg.engines.reading import is_there, reason
from recallseg.engines.specs import GRAPHS, OPTIONAL_GRAPHS, Geometry, GraphSpec, graph_specs

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "Bundle",
    "Description",
    "MemorySemantics",
    "Normalisation",
    "Weights",
]

FORMAT = "recallseg-bundle"
FORMAT_VERSION = 3
"""What is written. Format 2, which is read too, has all weights in the graphs. Format 1 as well; it
knows no memory but SAM 2's, no embedding of an empty memory and no former identity, and calls the
networks by the names of the first ones."""
NETWORKS = {1: ("sam2", "dinov2"), **dict.fromkeys((2, 3), ("segmenter", "embedder"))}
"""Keys of the segmenter's and the embedder's weights, by format version."""
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
    values of all tensors, so the same weights in another file format are the same weights. The
    names are canonical ones, except in format 1, where they are those of some ``transformers``.
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
        so it is a choice (pitfall 19).
    """

    object_pointers: bool
    pointer_time: float


@dataclass(frozen=True)
class Description:
    """What decides which embeddings and memories come out of a bundle, and how they are used.

    Attributes
    ----------
    digests : of the segmenter's and the embedder's weights.
    geometry, normalisation, memory : sizes, pixels' normalisation by graph, memory semantics.
    no_memory : C numbers that the segmenter adds to an image's features where nothing is recalled;
        None in bundles of format 1, which do not say.
    """

    digests: tuple[str, str]
    geometry: Geometry
    normalisation: Mapping[str, Normalisation]
    memory: MemorySemantics
    no_memory: tuple[float, ...] | None

    @property
    def identity(self) -> str:
        """Digest of all this, and not of the manifest file.

        Adding a variant or a precision does not change it, so libraries stay valid. ``max_k`` and
        ``max_n`` are limits of graphs, not of meaning, and stay out too.
        """
        sizes = self.geometry.to_json()
        left_out = ["max_k", "max_n"]
        if self.no_memory is None:
            left_out += ["tokens", "memory_grid"]
        value: dict[str, Any] = {
            "weights": list(self.digests),
            "geometry": {name: size for name, size in sizes.items() if name not in left_out},
            "normalisation": {
                name: [list(value.mean), list(value.std)]
                for name, value in self.normalisation.items()
            },
            "memory": [self.memory.object_pointers, self.memory.pointer_time],
        }
        if self.no_memory is not None:
            value["no_memory"] = list(self.no_memory)
        return digest_json(value)

    def former(self, segmenter: str, embedder: str) -> str:
        """Return the identity that format 1 gave the same with these digests of its weights."""
        return replace(self, digests=(segmenter, embedder), no_memory=None).identity


class Bundle:
    """An opened bundle. Graph files are checked against their digests when they are asked for.

    Attributes
    ----------
    path : the folder.
    name : what the bundle calls itself.
    identity : digest of weights, geometry, normalisation and memory semantics.
    former_identities : what bundles of the same weights were called before; libraries made with
        them belong to this one too.
    segmenter, embedder : where the weights came from.
    geometry, normalisation, memory : what preprocessing and composition need.
    no_memory : C numbers that conditioned features are offset by where nothing is recalled, or None
        in format 1.
    notice : what every result must say of the weights; empty for pretrained ones.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        try:
            version = int(manifest["version"])
            self.name = str(manifest["name"])
            first, second = NETWORKS[version]
            self.segmenter = Weights(**manifest["weights"][first])
            self.embedder = Weights(**manifest["weights"][second])
            self.geometry = Geometry.from_json(manifest["geometry"])
            self.normalisation = {
                graph: Normalisation(tuple(value["mean"]), tuple(value["std"]))
                for graph, value in manifest["normalisation"].items()
            }
            self.memory = MemorySemantics(**manifest["memory"])
            self.no_memory = tuple(map(float, manifest["no_memory"])) if version > 1 else None
            self.identity = str(manifest["identity"])
            former = [dict(entry) for entry in manifest["former_identities"]] if version > 1 else []
            self.former_identities = tuple(str(entry["identity"]) for entry in former)
            self._graphs: Mapping[str, Mapping[str, Any]] = manifest["graphs"]
            self._golden: Mapping[str, Any] = manifest["golden"]
            described = Description(
                (self.segmenter.digest, self.embedder.digest),
                self.geometry,
                self.normalisation,
                self.memory,
                self.no_memory,
            )
            expected = [described.former(entry["segmenter"], entry["embedder"]) for entry in former]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(
                f"the manifest of bundle {path} is incomplete: {reason(error)}. Export the bundle "
                "again."
            ) from error
        stated = (self.identity, *self.former_identities)
        for identity, computed in zip(stated, (described.identity, *expected), strict=True):
            if computed != identity:
                which = "identity" if identity == self.identity else "former identity"
                raise BundleError(
                    f"the manifest of bundle {path} was changed: it states {which} "
                    f"{identity[:12]}, its contents give {computed[:12]}. Restore it, or export "
                    "it again."
                )
        if self.no_memory is not None and len(self.no_memory) != self.geometry.channels:
            raise BundleError(
                f"the manifest of bundle {path} has {len(self.no_memory)} numbers of no_memory; "
                f"expected one for each of {self.geometry.channels} channels. Export it again."
            )

    def known_as(self, identity: str) -> bool:
        """Tell whether an identity is this bundle's, now or formerly."""
        return identity == self.identity or identity in self.former_identities

    @classmethod
    def open(cls, source: str | Path | Bundle) -> Bundle:
        """Open a folder, or a shipped bundle by its name (``"demo"``).

        Raises
        ------
        BundleError
            If there is no such bundle, its manifest cannot be read, or its format is newer.
        SignatureError
            If ``RECALLSEG_TRUST`` names keys, and none of them signed it as it is.
        """
        if isinstance(source, Bundle):
            return source
        path = Path(source)
        file = path / MANIFEST
        try:
            there = is_there(file)
        except OSError as error:
            raise BundleError(f"{file} cannot be looked at: {error.strerror}.") from error
        if str(source) in shipped_bundles():
            shipped = SHIPPED / str(source)
            if isinstance(source, str) and there:
                raise BundleError(
                    f"'{source}' is the shipped bundle {shipped} and the folder {path.absolute()} "
                    f"too. Say which: './{source}', or the path of the shipped one."
                )
            if isinstance(source, str) or not path.exists():
                path, file, there = shipped, shipped / MANIFEST, True
        if not there:
            names = ", ".join(shipped_bundles())
            raise BundleError(
                f"no bundle at '{source}': {file} does not exist. Give a folder made by "
                f"'recallseg export'{f', or one of: {names}' if names else ''}."
            )
        manifest = read_manifest(path)
        if manifest.get("format") != FORMAT:
            raise BundleError(f"{file} is not the manifest of a RecallSeg bundle.")
        version = manifest.get("version")
        if type(version) is not int or version not in NETWORKS:
            raise BundleError(
                f"bundle {path}{_networks_of(manifest)} has format version {version!r}; this "
                f"RecallSeg reads versions up to {FORMAT_VERSION}. Update RecallSeg, or export the "
                "bundle again."
            )
        return cls(path, manifest)

    @property
    def notice(self) -> str:
        """What outputs made with these weights must say (empty for pretrained weights)."""
        sources = {self.segmenter.source, self.embedder.source}
        for source in ("random", "demo"):
            if source in sources:
                return NOTICES[source]
        return NOTICES["pretrained"]

    @cached_property
    def specs(self) -> dict[str, GraphSpec]:
        """Specs of the graphs that it has, for this geometry."""
        return graph_specs(
            self.geometry,
            object_pointers=self.memory.object_pointers,
            optional=self.optional_graphs,
        )

    @cached_property
    def optional_graphs(self) -> tuple[str, ...]:
        """Those of :data:`OPTIONAL_GRAPHS` that it has in some variant."""
        found = {key.rsplit("/", 1)[-1] for key in self._graphs}
        return tuple(graph for graph in OPTIONAL_GRAPHS if graph in found)

    def graphs_for(self, variants: Sequence[str], precision: str) -> tuple[str, ...]:
        """Return the graphs that an engine runs: all five, and the optional ones that it finds."""
        there = [
            graph
            for graph in self.optional_graphs
            if any(f"{variant}/{precision}/{graph}" in self._graphs for variant in variants)
        ]
        return (*GRAPHS, *there)

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
        if graph not in (*GRAPHS, *OPTIONAL_GRAPHS):
            known = ", ".join((*GRAPHS, *OPTIONAL_GRAPHS))
            raise BundleError(f"there is no graph '{graph}'; the graphs are {known}.")
        if graph not in self.specs:
            raise BundleError(
                f"bundle {self.name} was exported without the graph '{graph}', which is optional. "
                "Export it again with a RecallSeg that makes it."
            )
        for variant in variants:
            entry = self._graphs.get(f"{variant}/{precision}/{graph}")
            if entry is not None:
                path = self._checked(entry)
                weights = self.weights_files(graph, variant, precision)
                check_graph(path, weights, digest=str(entry["sha256"]))
                return path, variant
        has = ", ".join(f"{name}: {' '.join(p)}" for name, p in self.precisions.items())
        raise BundleError(
            f"bundle {self.name} has no graph '{graph}' in precision '{precision}' for "
            f"{' or '.join(variants)}; it has {has}. Choose one of these, or make it: "
            f"{self._made_by(precision, variants)}."
        )

    def _made_by(self, precision: str, variants: Sequence[str]) -> str:
        """Return the command that gives a bundle a precision."""
        if precision == "fp32":
            return f"recallseg export ... --variants {','.join(variants)}"
        if precision == "pooled":
            return "recallseg export ... --pooled"
        return f"recallseg convert {self.path} --precisions {precision} --output FOLDER"

    def check_files(self) -> None:
        """Compare every file of the manifest with its digest, and look at every graph.

        Raises
        ------
        BundleError
            Naming the first that is missing, was changed, or is no network of tensors.
        """
        _ = self.golden_file
        for key in self._graphs:
            variant, precision, graph = key.split("/")
            self.graph_file(graph, (variant,), precision)

    def weights_files(self, graph: str, variant: str, precision: str) -> tuple[Path, ...]:
        """Return the files beside a graph that hold weights of it."""
        entry = self._graphs[f"{variant}/{precision}/{graph}"]
        return tuple(self.path / str(data["file"]) for data in data_files(entry))

    def graph_digest(self, graph: str, variant: str, precision: str) -> str:
        """Digest of a graph's file and of the weights beside it, as the manifest states them."""
        entry = self._graphs[f"{variant}/{precision}/{graph}"]
        # One that has all weights in itself is called as it always was.
        return digest_json([entry["sha256"], *([d["sha256"] for d in data_files(entry)] or [None])])

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
        for data in data_files(entry):
            self._checked(data)
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
            f"recallseg.Bundle({self.name!r}, {self.segmenter.architecture} at {g.image_size} px, "
            f"{self.embedder.architecture} at {g.embed_size} px, weights {self.segmenter.source}, "
            f"identity {self.identity[:12]})"
        )


def _networks_of(manifest: Mapping[str, Any]) -> str:
    """Return the networks that a manifest of unknown version names, as far as it does."""
    weights = manifest.get("weights")
    entries = weights.values() if isinstance(weights, Mapping) else ()
    names = [entry.get("architecture") for entry in entries if isinstance(entry, Mapping)]
    known = [str(name) for name in names if name]
    return f" (of {', '.join(known)})" if known else ""
