"""What made a result: the settings of the question, and everything that answered it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from recallseg.engines.digest import digest_json
from recallseg.engines.errors import LibraryCorruptError
from recallseg.engines.reading import reason
from recallseg.runtime.checks import check_count, check_key, check_number, check_tags
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.library.encoding import Origin
from recallseg.runtime.model.preprocess import Intensity

__all__ = ["Provenance", "Recipe"]

UNRECORDED = "unrecorded"


@dataclass(frozen=True)
class Recipe:
    """The settings of a question, without the library's contents.

    Results of one recipe can be compared; what was calibrated for one holds for no other, except
    where only the bundle's identity differs, and is a former one of the same bundle.

    Attributes
    ----------
    bundle_identity : of the weights, see :class:`recallseg.Bundle`.
    engine, precision : what ran the graphs.
    memory_format : how the library stores memories, ``fp16`` or ``int8``.
    k, reach, tags : see :class:`recallseg.Segmenter`.
    intensity : the library's rule from pixel values to 0..1, as JSON values.
    approximations : what the graphs leave out or put together, see
        :class:`recallseg.engines.precisions.Precision`.
    head : whether a head of the library's own takes part.
    """

    bundle_identity: str
    engine: str
    precision: str
    memory_format: str
    k: int
    reach: float
    tags: Mapping[str, str]
    intensity: Mapping[str, Any]
    approximations: tuple[str, ...] = ()
    head: bool = False

    def __post_init__(self) -> None:
        for name in ("tags", "intensity"):
            object.__setattr__(self, name, FrozenMap(getattr(self, name)))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all fields, hex."""
        return digest_json(self.to_json())

    def digests(self, former_identities: Iterable[str]) -> tuple[str, ...]:
        """Return its digest, then those that it had under former identities of the bundle."""
        former = (replace(self, bundle_identity=one).digest for one in former_identities)
        return (self.digest, *former)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; an infinite reach is the text ``inf``."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "reach": "inf" if math.isinf(self.reach) else self.reach,
            "tags": dict(self.tags),
            "intensity": dict(self.intensity),
            "approximations": list(self.approximations),
        }

    @classmethod
    def from_json(cls, data: Any) -> Recipe:
        """Rebuild from :meth:`to_json`; raises LibraryCorruptError for anything else."""
        names = {field.name for field in fields(cls)}
        try:
            given = {name: value for name, value in data.items() if name != "digest"}
            texts = [given[name] for name in ("bundle_identity", "engine", "precision")]
            for value in (*texts, given["memory_format"], *given["approximations"]):
                check_key(value)
            recipe = cls(
                **{
                    **given,
                    "k": check_count(given["k"], "k", 1),
                    "reach": check_number(float(given["reach"]), "reach", 1),
                    "tags": check_tags(given["tags"]),
                    "intensity": Intensity(**given["intensity"]).to_json(),
                    "approximations": tuple(given["approximations"]),
                }
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LibraryCorruptError(
                f"the record of a recipe is damaged: {reason(error)}."
            ) from error
        if {*given} != names or not isinstance(recipe.head, bool):
            raise LibraryCorruptError("the record of a recipe is damaged or of a newer RecallSeg.")
        return recipe

    def __str__(self) -> str:
        tags = "".join(f", {name}={value}" for name, value in self.tags.items())
        return (
            f"k={self.k}, reach={self.reach:g}{tags}, {self.engine} {self.precision}, memories in "
            f"{self.memory_format}, bundle {self.bundle_identity[:12]}, digest {self.digest[:12]}"
        )

    def __repr__(self) -> str:
        return f"recallseg.Recipe({self})"


@dataclass(frozen=True)
class Provenance:
    """Everything that made a result.

    Attributes
    ----------
    recipe : the settings.
    library_digest : of what was annotated: exemplars, masks, tags, intensity rule.
    memories : what made the library's memories, and of how many exemplars; None: unrecorded.
    structures : what was asked for, in the order of the label values.
    graphs : digests of the graphs that ran, by name; see :meth:`recallseg.Bundle.graph_digest`.
    frame_memories : most memories of earlier frames or slices that could be used.
    head : digest of the library's head; None without one.
    version : of RecallSeg.
    operators : SHA-256 of the native operators that the graphs ran with; None if they need none.
    """

    recipe: Recipe
    library_digest: str
    memories: tuple[tuple[Origin | None, int], ...]
    structures: tuple[str, ...]
    graphs: Mapping[str, str]
    frame_memories: int
    head: str | None
    version: str
    operators: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "graphs", FrozenMap(self.graphs))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all fields, hex."""
        return digest_json(self._fields())

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, with the digests of recipe and whole."""
        whole = self._fields()
        whole["recipe"] = {"digest": self.recipe.digest, **whole["recipe"]}
        return {"digest": self.digest, **whole}

    def to_texts(self) -> dict[str, str]:
        """Return the essence as names and short texts, for formats that keep nothing else."""
        recipe = self.recipe
        made = [
            f"{UNRECORDED if origin is None else f'{origin.engine} {origin.precision}'}: {count}"
            for origin, count in self.memories
        ]
        return {
            "provenance": self.digest,
            "recipe": recipe.digest,
            "bundle": recipe.bundle_identity,
            "library": self.library_digest,
            "memories": ", ".join(made),
            "memory_format": recipe.memory_format,
            "engine": recipe.engine,
            "precision": recipe.precision,
            "k": str(recipe.k),
            "reach": f"{recipe.reach:g}",
            "tags": ", ".join(f"{name}={value}" for name, value in recipe.tags.items()) or "none",
            "frame_memories": str(self.frame_memories),
        }

    def _fields(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_json(),
            "library_digest": self.library_digest,
            "memories": [
                {"origin": UNRECORDED if origin is None else asdict(origin), "exemplars": count}
                for origin, count in self.memories
            ],
            "structures": list(self.structures),
            "graphs": dict(self.graphs),
            "frame_memories": self.frame_memories,
            "head": self.head,
            "version": self.version,
            "operators": self.operators,
        }

    def __repr__(self) -> str:
        return (
            f"recallseg.Provenance({self.recipe!r}, library {self.library_digest[:12]}, RecallSeg "
            f"{self.version}, digest {self.digest[:12]})"
        )
