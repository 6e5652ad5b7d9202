"""What sections of a service's configuration are made of: frozen values that know no other key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = [
    "Host",
    "Listening",
    "Place",
    "Port",
    "Seconds",
    "Section",
    "containers_in",
    "fields_of",
    "places_from",
    "sections_in",
]

_FOLDER: ContextVar[Path] = ContextVar("folder of the configuration")


def _from_folder(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("a path has no NUL")
    try:
        return _FOLDER.get(Path()) / path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no home folder '{path.parts[0]}'") from error


def _host(text: str) -> str:
    try:
        named = text.encode("idna")  # as the system's resolver is asked
    except UnicodeError:
        named = b""
    if not named or not text.isprintable() or " " in text:
        raise ValueError(f"no host can be called '{text}': give a name or an address")
    return text


Place = Annotated[Path, AfterValidator(_from_folder)]
"""A path; a relative one is meant from the folder of the configuration's file."""
Host = Annotated[str, AfterValidator(_host)]
"""A name or an address."""
Port = Annotated[int, Field(ge=0, le=65535)]
"""0 lets the system choose one, which the log then says."""
Seconds = Annotated[float, Field(gt=0, le=30 * 86400, allow_inf_nan=False)]


@contextmanager
def places_from(folder: Path) -> Iterator[None]:
    """Let relative paths be meant from ``folder``."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


class Section(BaseModel):
    """A part of a configuration: it cannot be changed, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Listening(Section):
    """Where a service listens.

    Attributes
    ----------
    host : address or name; the loopback unless told otherwise.
    port : 0 lets the system choose one.
    most_clients : connections at once; more are closed or refused at once.
    idle_s : seconds without a byte after which a connection is closed.
    """

    host: Host = "127.0.0.1"
    port: Port = 0
    most_clients: Annotated[int, Field(ge=1, le=1000)] = 50
    idle_s: Seconds = 60.0


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a field's type has, at any depth of unions and collections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if hasattr(annotation, "__value__"):
        return sections_in(annotation.__value__)
    return [found for part in get_args(annotation) for found in sections_in(part)]


def containers_in(annotation: Any) -> int:
    """Return how many keys lead from a field to its sections: 1 for a list or table of them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return containers_in(get_args(annotation)[0])
    inner = max((containers_in(part) for part in get_args(annotation)), default=0)
    return inner + (isinstance(origin, type) and issubclass(origin, (tuple, dict)))


def fields_of(sections: list[type[BaseModel]]) -> Mapping[str, Any]:
    """Return the types of all fields of these sections, by name."""
    return {
        name: field.annotation
        for section in sections
        for name, field in section.model_fields.items()
    }
