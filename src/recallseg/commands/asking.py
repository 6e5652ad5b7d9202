"""What commands that segment are asked in common: how, with what engine, and what becomes of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, get_type_hints

import typer

from recallseg.commands.common import (
    AsStoredOption,
    AuditHeadOption,
    AuditKeyOption,
    AuditOption,
    CleanUpOption,
    EngineOption,
    FormatOption,
    PlaneOption,
    PrecisionOption,
    PreviewOption,
    PropagateOption,
    ReachOption,
    StackOption,
    StrictOption,
    TagOption,
    ThreadsOption,
    TimeOption,
    VoiOption,
    open_audit,
    parse_tags,
    parsed,
    split_clean_ups,
    split_list,
    split_time,
)
from recallseg.engines import defaults
from recallseg.runtime.segmenting.reach import REACH

if TYPE_CHECKING:
    from recallseg.runtime.library import Library
    from recallseg.runtime.segmenting.segmenter import Segmenter
    from recallseg.runtime.services.audit import AuditLog
    from recallseg.runtime.volumes.outputs import VolumeSettings

__all__ = ["Asking", "Handling", "grouped"]


@dataclass(frozen=True)
class Asking:
    """How to segment."""

    k: Annotated[int, typer.Option("--k", min=1, help="Most exemplars to recall.")] = defaults.K
    reach: ReachOption = REACH
    structures: Annotated[
        Optional[str], typer.Option(help="Which, in the order of label values.", show_default="all")
    ] = None
    tag: TagOption = None
    engine: EngineOption = defaults.ENGINE
    precision: PrecisionOption = defaults.PRECISION
    threads: ThreadsOption = None
    refine: Annotated[
        bool,
        typer.Option(
            "--refine/--no-refine", help="Let the library's head, if it has one, take part."
        ),
    ] = True

    def check(self) -> None:
        """Parse what has to be; raises BadParameter."""
        self._parsed()

    def segmenter(self, library: Library, frames: int = 0) -> Segmenter:
        """Return a segmenter of an open library."""
        from recallseg.runtime.segmenting.segmenter import Segmenter

        return Segmenter(library, **self.settings(frames))

    def settings(self, frames: int = 0) -> dict[str, Any]:
        """Return the keyword arguments of a segmenter; raises BadParameter."""
        names, tags = self._parsed()
        return {
            "k": self.k,
            "structures": names,
            "tags": tags,
            "reach": self.reach,
            "engine": self.engine,
            "precision": self.precision,
            "threads": self.threads,
            "frames": frames,
            "refine": self.refine,
        }

    def _parsed(self) -> tuple[list[str] | None, dict[str, str]]:
        names = None
        if self.structures is not None:
            names = parsed(split_list, self.structures, "--structures")
        return names, parse_tags(self.tag)


@dataclass(frozen=True)
class Handling:
    """What is taken of what there is, and what is done with it and with results."""

    plane: PlaneOption = None
    propagate: PropagateOption = 0
    clean_up: CleanUpOption = None
    preview: PreviewOption = False
    voi: VoiOption = False
    codes: Annotated[
        Optional[Path],
        typer.Option(help="Codes of structures (TOML or JSON) for SEG and .seg.nrrd."),
    ] = None
    as_stored: AsStoredOption = False
    format: FormatOption = None
    time: TimeOption = None
    stack: StackOption = None
    strict: StrictOption = False
    audit: AuditOption = None
    audit_key: AuditKeyOption = None
    audit_head: AuditHeadOption = None

    def volumes(self) -> VolumeSettings:
        """Return the settings for volumes; raises BadParameter, and InputError for a bad file."""
        from recallseg.runtime.formats.concepts import read_concepts
        from recallseg.runtime.volumes.outputs import VolumeSettings

        wanted = (
            () if self.clean_up is None else parsed(split_clean_ups, self.clean_up, "--clean-up")
        )
        return VolumeSettings(
            self.plane,
            "largest" in wanted,
            "holes" in wanted,
            self.preview,
            self.voi,
            {} if self.codes is None else read_concepts(self.codes),
            self.as_stored,
            None if self.time is None else parsed(split_time, self.time, "--time"),
            self.stack,
        )

    def log(self) -> AuditLog | None:
        """Open the audit log, if there shall be one."""
        return open_audit(self.audit, self.audit_key, self.audit_head)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of its parameters that are groups of options.

    A group is a frozen dataclass like those above; the command gets one, made of what was given.
    """
    groups: dict[str, Any] = {}
    shown: list[inspect.Parameter] = []
    # Not get_type_hints, which on Python 3.10 hides what is Annotated where the default is None.
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        kind = parameter.annotation
        if not is_dataclass(kind):
            shown.append(_parameter(name, parameter.default, kind))
            continue
        groups[name] = kind
        types = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            shown.append(_parameter(field.name, default, types[field.name]))

    @wraps(command)
    def run(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        command(**given)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )
