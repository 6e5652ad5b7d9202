"""The paper's experiment (Zhao et al., arXiv 2408.08813) on a user's data and weights.

Fifty slices are segmented from annotated ones with k = 2, 4, 8, 16 and 32. What the paper leaves
open is decided here and said: which slices, and that no patient is on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines import defaults
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.library import Library
from recallseg.runtime.library.encoding import Encoded
from recallseg.runtime.library.exemplar import StoredMemory
from recallseg.runtime.model.model import Model
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.reports.annotated_sources import Images, Source
from recallseg.runtime.reports.cases import RECALLED, Arm, Evaluation
from recallseg.runtime.reports.challenges import Challenge
from recallseg.runtime.reports.evaluation import evaluate
from recallseg.runtime.reports.paired import budgets as by_budget
from recallseg.runtime.segmenting.reach import REACH
from recallseg.runtime.segmenting.segmenter import Segmenter

if TYPE_CHECKING:
    from recallseg.engines.bundle import Bundle

__all__ = [
    "BUDGETS",
    "KS",
    "PAPER_DICE",
    "PAPER_MS",
    "Deviation",
    "Protocol",
    "Reproduction",
    "reproduce",
]

KS = (2, 4, 8, 16, 32)
QUERIES = 50
BUDGETS = (8, 16, 32, 64)
PAPER_DICE: Mapping[tuple[str, str], Mapping[int, float]] = {
    ("ACDC", "RV"): dict(zip(KS, (0.38, 0.49, 0.65, 0.67, 0.69), strict=True)),
    ("ACDC", "Myo"): dict(zip(KS, (0.54, 0.64, 0.75, 0.77, 0.76), strict=True)),
    ("ACDC", "LV"): dict(zip(KS, (0.55, 0.68, 0.82, 0.85, 0.86), strict=True)),
}
"""Dice by data set and structure, by k."""
PAPER_MS = {1: 53, 4: 171, 16: 515}
"""Milliseconds of one image by k, on the paper's GPU."""
HELD_OUT = 5
"""Every so many-th patient gives queries, where a data set has no part for testing."""


@dataclass(frozen=True)
class Protocol:
    """How ours differs from the paper's; see :meth:`deviations` for what each is.

    Attributes
    ----------
    exact_memories, every_distance, no_presence, whole_range : do as the paper there.
    """

    exact_memories: bool = False
    every_distance: bool = False
    no_presence: bool = False
    whole_range: bool = False

    @classmethod
    def as_the_paper(cls) -> Protocol:
        """Return the one with everything turned off that can be."""
        return cls(True, True, True, True)

    def deviations(self, bundle: Bundle) -> tuple[Deviation, ...]:
        """Return all, in force or not."""
        pointers = bundle.memory.object_pointers
        return (
            Deviation(
                "memories are stored in fp16 (the paper: as SAM 2 makes them)",
                "--exact-memories",
                not self.exact_memories,
            ),
            Deviation(
                f"reach: of the k, only exemplars up to {REACH:g} times as far as the nearest",
                "--every-distance",
                not self.every_distance,
            ),
            Deviation(
                "presence: a structure that the most similar exemplars lack is not looked for",
                "--no-presence",
                not self.no_presence,
            ),
            Deviation(
                "intensities: the 1st to 99th percentile of an image become 0 to 1 (the paper: "
                "not said; instead, its smallest to its largest value)",
                "--whole-range",
                not self.whole_range,
            ),
            Deviation(
                f"pointer time: exemplars have no time, all get {bundle.memory.pointer_time:.3g}"
                if pointers
                else "object pointers are left out by this bundle",
                "a bundle exported with --no-object-pointers has none",
                pointers,
            ),
            Deviation("head: one that was fitted to a library refines masks", "never here", False),
            Deviation(
                "patients: no exemplar is of a query's patient (the paper: not said)", "-", True
            ),
        )


@dataclass(frozen=True)
class Deviation:
    """What is not as in the paper, what turns it off, and whether it is in force."""

    what: str
    switch: str
    active: bool


@dataclass(frozen=True)
class Reproduction:
    """One data set's outcome.

    Attributes
    ----------
    exemplars, queries, patients : slices to recall from and to segment, and patients of each.
    evaluation : all of it; k = 1 is there for its time.
    deviations : from the paper.
    notes : what was decided or left out.
    """

    challenge: str
    structures: tuple[str, ...]
    exemplars: int
    queries: int
    patients: tuple[int, int]
    evaluation: Evaluation
    deviations: tuple[Deviation, ...]
    notes: tuple[str, ...]

    def dice(self, structure: str, k: int) -> float:
        """Return the mean Dice of the slices that show a structure; NaN if none does."""
        found = [
            row.dice
            for row in self.evaluation.cases
            if row.structure == structure and row.arm == Arm(RECALLED, k) and row.reference_volume
        ]
        return float(np.mean(found)) if found else float("nan")

    def milliseconds(self, k: int) -> float:
        """Return the median time of an image."""
        found = [one.stages["total"] for one in self.evaluation.timings if one.k == k]
        return float(np.median(found)) if found else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Return the table, the paper's numbers and what differs, as JSON values."""
        ks = [k for k in self.evaluation.ks if k in KS]
        return {
            "data": self.challenge,
            "exemplars": self.exemplars,
            "queries": self.queries,
            "patients": {"exemplars": self.patients[0], "queries": self.patients[1]},
            "dice": {
                name: {str(k): _or_none(self.dice(name, k)) for k in ks} for name in self.structures
            },
            "paper_dice": {
                name: {str(k): v for k, v in PAPER_DICE[self.challenge, name].items()}
                for name in self.structures
                if (self.challenge, name) in PAPER_DICE
            },
            "ms": {str(k): self.milliseconds(k) for k in self.evaluation.ks},
            "paper_ms": {str(k): ms for k, ms in PAPER_MS.items()},
            "budgets": [vars(one) for one in by_budget(self.evaluation)],
            "deviations": [vars(one) for one in self.deviations],
            "notes": list(self.notes),
            "failures": dict(self.evaluation.failures),
        }


def reproduce(
    challenge: Challenge,
    bundle: Bundle,
    folder: Path,
    *,
    protocol: Protocol | None = None,
    queries: int = QUERIES,
    budgets: Sequence[int] = BUDGETS,
    draws: int = 3,
    engine: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Reproduction:
    """Run the paper's experiment on one data set.

    Parameters
    ----------
    folder : for the library; must be new or empty.
    protocol : what is done as the paper does it; None: as RecallSeg does.
    queries : slices to segment, drawn with a fixed seed from those that show a structure.
    budgets : numbers of annotated slices to recall from, beside all; larger ones are left out.

    Raises
    ------
    InputError
        If there are too few patients, or a file cannot be read.
    """
    protocol = protocol or Protocol()
    notes = [*challenge.notes]
    held_out = _held_out(challenge)
    mine, asked = _slices(challenge, held_out)
    if not mine or not asked:
        raise InputError(f"{challenge.name} shows no structure in exemplars or in queries.")
    if len(asked) > queries:
        drawn = np.random.default_rng(0).choice(len(asked), queries, replace=False)
        asked = [asked[int(i)] for i in np.sort(drawn)]
    elif len(asked) < queries:
        notes.append(f"{len(asked)} slices to segment instead of {queries}: there are no more")
    model = Model.open(
        bundle,
        engine=engine or defaults.ENGINE,
        precision=precision or defaults.PRECISION,
        threads=threads,
    )
    with model, _library(folder, bundle, model, protocol) as library:
        for number, annotated in enumerate(mine):
            absent = () if protocol.no_presence else annotated.absent
            # By a key: slices may be equal, and the paper takes each for one.
            key = f"slice {number}"
            library.add(annotated.image, annotated.masks, absent=absent, key=key)
        most = bundle.geometry.max_k
        ks = [k for k in (1, *KS) if k <= most]
        if ks[-1] != KS[-1]:
            notes.append(f"the bundle recalls at most {most}: larger k are left out")
        counts = [count for count in budgets if count < len(library)]
        left = [count for count in budgets if count >= len(library)]
        if left:
            notes.append(
                f"budgets {', '.join(map(str, left))} are left out: there are {len(library)} slices"
            )
        structures = [name for name in challenge.structures if name in library.structures]

        def make(k: int) -> Segmenter:
            reach = np.inf if protocol.every_distance else REACH
            return Segmenter(library, k=k, structures=structures, reach=reach, model=model)

        sources = [
            Source(one.name, lambda one=one: Images((one,)), group=group, unit="patient")  # type: ignore[misc]
            for one, group in asked
        ]
        found = evaluate(
            library, sources, structures, ks, make, budgets=counts, draws=draws, progress=progress
        )
    return Reproduction(
        challenge.name,
        challenge.structures,
        found.exemplars,
        len(asked),
        (len({s.group for s in challenge.sources} - held_out), len({g for _, g in asked})),
        found,
        protocol.deviations(bundle),
        tuple(notes),
    )


def _held_out(challenge: Challenge) -> frozenset[str]:
    """Return the patients that give queries."""
    patients = sorted({source.group for source in challenge.sources})
    if len(patients) < 2:
        raise InputError(
            f"{challenge.name} has {len(patients)} patient here; exemplars and queries must be of "
            "different ones."
        )
    if challenge.held_out and set(patients) - challenge.held_out:
        return challenge.held_out
    return frozenset(patients[HELD_OUT - 1 :: HELD_OUT] or patients[-1:])


def _slices(
    challenge: Challenge, held_out: frozenset[str]
) -> tuple[list[Annotated], list[tuple[Annotated, str]]]:
    """Return slices that show something: exemplars, and those to segment with their patient."""
    mine, asked = [], []
    for source in challenge.sources:
        for annotated in source.read().annotated:
            if not annotated.masks:
                continue
            if source.group in held_out:
                asked.append((annotated, source.group))
            else:
                mine.append(annotated)
    return mine, asked


def _library(folder: Path, bundle: Bundle, model: Model, protocol: Protocol) -> Library:
    intensity = Intensity("percentile", 0.0, 100.0) if protocol.whole_range else Intensity()
    if not protocol.exact_memories:
        return Library.create(folder, bundle, intensity=intensity, model=model)
    return _ExactLibrary.recording(folder, bundle, intensity, model)


class _Recorder:
    """Encodes with a model, and keeps what came out last."""

    def __init__(self, model: Model, intensity: Intensity) -> None:
        self._model, self._intensity = model, intensity
        self.last: Encoded | None = None

    def embed(self, image: NDArray[Any]) -> NDArray[np.float32]:
        return self._model.embed(image, self._intensity)

    def encode(self, image: NDArray[Any], masks: Mapping[str, NDArray[np.bool_]]) -> Encoded:
        self.last = self._model.memorize(image, masks, self._intensity)
        return self.last


class _ExactLibrary(Library):
    """A library that gives memories as they were made, in float32, beside storing them in fp16."""

    _recorder: _Recorder
    _made: dict[str, Encoded]

    @classmethod
    def recording(
        cls, folder: Path, bundle: Bundle, intensity: Intensity, model: Model
    ) -> _ExactLibrary:
        recorder = _Recorder(model, intensity)
        library = cls.create(folder, bundle, intensity=intensity, model=model, encoder=recorder)
        assert isinstance(library, cls)
        library._recorder, library._made = recorder, {}
        return library

    def add(self, image: Any, masks: Mapping[str, Any], **how: Any) -> str:
        key = super().add(image, masks, **how)
        made = self._recorder.last
        assert made is not None
        self._made[key] = made
        return key

    def gather(
        self,
        memories: Sequence[StoredMemory],
        memories_out: NDArray[Any],
        pointers_out: NDArray[np.float32],
    ) -> None:
        for row, memory in enumerate(memories):
            made = self._made[memory.key]
            memories_out[row] = made.memories[memory.structure]
            pointers_out[row] = made.pointers[memory.structure]


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value
