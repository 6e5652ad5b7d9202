"""One configuration for all services: a TOML file, checked in full before anything is started.

Any value can also come from the environment, for containers: ``RECALLSEG__NODE__PORT=104`` is
``port`` of the section ``node``. What is unknown in either is an error that names the nearest name.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from recallseg.engines.errors import InputError
from recallseg.engines.reading import read_text
from recallseg.runtime.json_text import printable
from recallseg.runtime.services.audit import AuditLog, open_audit
from recallseg.runtime.services.igtl.settings import IgtlSettings
from recallseg.runtime.services.mrd.settings import MrdSettings
from recallseg.runtime.services.node.settings import NodeSettings
from recallseg.runtime.services.rules import Rule
from recallseg.runtime.services.sections import (
    Host,
    Place,
    Port,
    Seconds,
    Section,
    containers_in,
    fields_of,
    places_from,
    sections_in,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["EXAMPLES", "AuditSettings", "Configuration", "LogSettings", "MetricsSettings"]
__all__ += ["example", "read_configuration"]

EXAMPLES = Path(__file__).parent / "examples"
"""A configuration for each service, as ``recallseg config example`` prints them."""
ENVIRONMENT = "RECALLSEG__"
_SECRET = ("password", "token", "secret")


class LogSettings(Section):
    """How the service tells what it does, on stderr: a JSON object, or a line for people, each."""

    format: Literal["json", "text"] = "json"
    level: Literal["debug", "info", "warning", "error"] = "info"


class MetricsSettings(Section):
    """Where Prometheus finds ``/metrics``, and an orchestrator ``/healthz`` and ``/readyz``."""

    host: Host = "127.0.0.1"
    port: Port = 9464


class AuditSettings(Section):
    """The log in which every segmentation is recorded; see docs/device/security.md."""

    log: Place
    key: Optional[Place] = None
    head: Optional[Place] = None

    def open(self) -> AuditLog:
        """Open it; raises AuditError."""
        return open_audit(self.log, self.key, self.head)


class Configuration(BaseSettings):
    """Everything that services are told.

    Attributes
    ----------
    state : folder for what a service must not forget; its own, and not shared with another's.
    stop_s : seconds to finish what is begun when the service is told to stop.
    rules : what is done with what arrives.
    metrics, audit : None for none.
    node : see :class:`recallseg.runtime.services.node.settings.NodeSettings`.
    mrd : see :class:`recallseg.runtime.services.mrd.settings.MrdSettings`.
    igtl : see :class:`recallseg.runtime.services.igtl.settings.IgtlSettings`.
    """

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=ENVIRONMENT, env_nested_delimiter="__"
    )

    state: Optional[Place] = None
    stop_s: Annotated[Seconds, Field(le=3600)] = 30.0
    log: LogSettings = LogSettings()
    metrics: Optional[MetricsSettings] = None
    audit: Optional[AuditSettings] = None
    rules: tuple[Rule, ...] = ()
    node: Optional[NodeSettings] = None
    mrd: Optional[MrdSettings] = None
    igtl: Optional[IgtlSettings] = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment win over the file."""
        return env_settings, init_settings

    @model_validator(mode="after")
    def _names_are_known(self) -> Configuration:
        twice = [name for name, n in Counter(rule.name for rule in self.rules).items() if n > 1]
        if twice:
            raise ValueError(f"two rules are named '{twice[0]}'; give each a name of its own")
        known = self.node.destinations if self.node is not None else {}
        for rule in self.rules:
            for name in rule.destinations:
                if name not in known:
                    raise ValueError(
                        f"rule '{rule.name}' sends to '{name}', and there is no "
                        f"node.destinations.{name}{_nearest(name, known) if known else ''}"
                    )
        return self


def read_configuration(path: str | Path) -> Configuration:
    """Read and check a configuration.

    Raises
    ------
    InputError
        Naming every value that is wrong, missing or unknown.
    """
    path = Path(path)
    try:
        table = tomllib.loads(read_text(path))
    except OSError as error:
        raise InputError(
            f"the configuration {printable(path)} cannot be read: {error.strerror}."
        ) from error
    except (ValueError, RecursionError) as error:  # of both parsers; of bytes that are no UTF-8
        raise InputError(f"{printable(path)} is no TOML: {error}.") from error
    wrong = [*_unknown_in_environment(os.environ)]
    # pydantic-settings would take these for options of its own.
    kept = {name: value for name, value in table.items() if not name.startswith("_")}
    wrong += [
        f"there is no setting '{name}'{_nearest(name, Configuration.model_fields)}"
        for name in table.keys() - kept.keys()
    ]
    with places_from(path.absolute().parent):
        try:
            found = Configuration(**kept)
        except ValidationError as error:
            wrong += [_told(each) for each in error.errors(include_url=False)]
        except (SettingsError, RecursionError) as error:
            field = re.search(r'field "(\w+)"', str(error))
            begin = ENVIRONMENT + (field[1].upper() if field else "")
            names = sorted(name for name in os.environ if name.upper().startswith(begin))
            wrong.append(
                f"of the environment's {', '.join(names)} one is no JSON, in which lists and "
                "tables are given there"
            )
    if wrong:
        raise InputError(f"{printable(path)}: {'; '.join(wrong)}.")
    return found


def example(service: str) -> str:
    """Return an example of a service's configuration; InputError if there is none."""
    known = sorted(path.stem for path in EXAMPLES.glob("*.toml"))
    if service not in known:
        raise InputError(f"there is no example '{service}'; choose of {', '.join(known)}.")
    return read_text(EXAMPLES / f"{service}.toml")


def _unknown_in_environment(environment: Mapping[str, str]) -> Iterable[str]:
    for name in sorted(environment):
        if name.upper().startswith(ENVIRONMENT):
            first = name[len(ENVIRONMENT) :].split("__")[0].lower()
            if first not in Configuration.model_fields:
                near = _nearest(first, Configuration.model_fields)
                yield f"the environment's {name} sets '{first}', which there is not{near}"


def _told(error: Any) -> str:
    """Return one of pydantic's errors in our words."""
    where, known = _walked(error["loc"])
    if error["type"] == "extra_forbidden":
        near = _nearest(str(where[-1]), known, where[:-1])
        return f"there is no setting '{_dotted(where)}'{near}"
    if error["type"] == "missing":
        return f"'{_dotted(where)}' is missing"
    said = str(error["msg"]).removeprefix("Value error, ")
    value = error.get("input")
    secret = any(word in str(part) for part in where for word in _SECRET)
    plain = isinstance(value, (str, int, float, bool)) and not secret
    got = f", got {value!r}" if plain and error["type"] != "value_error" else ""
    return f"{_dotted(where)}: {said}{got}" if where else said


def _walked(where: Sequence[Any]) -> tuple[tuple[Any, ...], Iterable[str]]:
    """Return where a setting stands as a person writes it, and what else could stand there.

    Pydantic also tells which of several kinds a table was taken for, which is in no file.
    """
    sections: list[type[BaseModel]] = [Configuration]
    written: list[Any] = []
    known: Iterable[str] = ()
    keys = 0  # names or positions that come before the next section
    for at, part in enumerate(where):
        known = fields = fields_of(sections)
        if keys:
            keys -= 1
        elif part in fields:
            keys, sections = containers_in(fields[part]), sections_in(fields[part])
        elif at < len(where) - 1:
            continue
        written.append(part)
    return tuple(written), known


def _nearest(name: str, known: Iterable[str], where: tuple[Any, ...] = ()) -> str:
    near = get_close_matches(name, list(known), 1)
    if near:
        return f"; did you mean '{_dotted((*where, near[0]))}'?"
    return f"; known are {', '.join(sorted(known))}"


def _dotted(where: Iterable[Any]) -> str:
    text = ""
    for part in where:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")
