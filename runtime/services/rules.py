"""Rules: what arrives is mapped to a question (library, structures, recipe) and to destinations.

One set of rules serves every protocol: a DICOM series, an MRD connection and an OpenIGTLink device
are all described by an :class:`Arriving`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BeforeValidator, Field

from recallseg.engines import defaults
from recallseg.runtime.formats.concepts import read_concepts
from recallseg.runtime.segmenting.reach import REACH
from recallseg.runtime.services.sections import Place, Section
from recallseg.runtime.volumes.outputs import VolumeSettings

__all__ = ["Arriving", "RecipeSettings", "Rule", "VolumeHandling", "When", "fitting"]


@dataclass(frozen=True)
class Arriving:
    """What is known of something that arrives; empty where nothing is said.

    Attributes
    ----------
    modality, body_part, series_description : as DICOM names them (0008,0060), (0018,0015) and
        (0008,103E), and what other protocols have in their place.
    senders : who sent it (calling AE titles, names of devices); several if several did.
    called : the name that they called.
    parameters : of the message, as texts.
    """

    modality: str = ""
    body_part: str = ""
    series_description: str = ""
    senders: tuple[str, ...] = ()
    called: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


_Pattern = Annotated[str, Field(min_length=1)]
Patterns = Annotated[
    tuple[_Pattern, ...],
    Field(min_length=1),
    BeforeValidator(
        _one_or_more,
        json_schema_input_type=Union[
            _Pattern, Annotated[tuple[_Pattern, ...], Field(min_length=1)]
        ],
    ),
]
"""One pattern or several, of which one must fit: ``*`` any characters, ``?`` one, ``[ab]`` one of
these; upper and lower case are the same. The whole text must fit."""


class When(Section):
    """What must fit. What is left out fits everything; all that is given must fit."""

    modality: Optional[Patterns] = None
    body_part: Optional[Patterns] = None
    series_description: Optional[Patterns] = None
    sender: Optional[Patterns] = None
    called: Optional[Patterns] = None
    parameters: dict[str, Patterns] = Field(default_factory=dict)

    def fits(self, arriving: Arriving) -> bool:
        """Whether all that is asked for fits."""
        pairs = (
            (self.modality, (arriving.modality,)),
            (self.body_part, (arriving.body_part,)),
            (self.series_description, (arriving.series_description,)),
            (self.sender, arriving.senders),
            (self.called, (arriving.called,)),
            *(
                (wanted, (arriving.parameters.get(name, ""),))
                for name, wanted in self.parameters.items()
            ),
        )
        return all(wanted is None or _fits(wanted, texts) for wanted, texts in pairs)


class RecipeSettings(Section):
    """How to segment; see :class:`recallseg.Segmenter`, whose words these are."""

    k: Annotated[int, Field(ge=1)] = defaults.K
    reach: Annotated[float, Field(ge=1)] = REACH
    tags: dict[str, str] = Field(default_factory=dict)
    engine: str = defaults.ENGINE
    precision: str = defaults.PRECISION
    threads: Optional[Annotated[int, Field(ge=1)]] = None


class VolumeHandling(Section):
    """How volumes are treated; see :class:`recallseg.runtime.volumes.outputs.VolumeSettings`.

    ``propagate`` are the slices whose memories help the next one, ``codes`` a file of coded
    meanings of structures.
    """

    plane: Optional[Literal["axial", "coronal", "sagittal"]] = None
    propagate: Annotated[int, Field(ge=0)] = 0
    largest: bool = False
    fill_holes: bool = False
    voi: bool = False
    codes: Optional[Place] = None
    time: Optional[Union[Annotated[int, Field(ge=1)], Literal["all"]]] = None
    stack: Optional[str] = None

    def settings(self, *, preview: bool = False) -> VolumeSettings:
        """Return the settings; raises InputError for a bad file of codes."""
        return VolumeSettings(
            self.plane,
            self.largest,
            self.fill_holes,
            preview,
            self.voi,
            {} if self.codes is None else read_concepts(self.codes),
            time=self.time,
            stack=self.stack,
        )


class Rule(Section):
    """What fits ``when`` is asked of ``library``, and the answer goes to ``destinations``.

    Attributes
    ----------
    name : of the rule; answers and records are known by it.
    structures : which, in the order of label values; None for all that the library knows.
    destinations : names of the configuration's destinations.
    preview, report : also make a picture (secondary capture), and a text with volumes and quality.
    """

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    when: When = When()
    library: Place
    structures: Optional[Annotated[tuple[str, ...], Field(min_length=1)]] = None
    recipe: RecipeSettings = RecipeSettings()
    volumes: VolumeHandling = VolumeHandling()
    destinations: tuple[str, ...] = ()
    preview: bool = False
    report: bool = False


def fitting(rules: Iterable[Rule], arriving: Arriving) -> tuple[Rule, ...]:
    """Return the rules that fit, in their order."""
    return tuple(rule for rule in rules if rule.when.fits(arriving))


def _fits(patterns: Iterable[str], texts: Iterable[str]) -> bool:
    return any(
        fnmatchcase(text.strip().casefold(), pattern.casefold())
        for pattern in patterns
        for text in texts
    )
