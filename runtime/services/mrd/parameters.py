"""What a scanner says beside its images: configuration, parameters, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from recallseg.engines.errors import InputError
from recallseg.runtime.services.mrd.settings import Returned
from recallseg.runtime.services.mrd.wire import parse_xml

__all__ = ["PARAMETERS", "Said", "Wish"]

PARAMETERS = ("config", "structures", "k", *Returned.model_fields)
"""That are understood; all others can be asked for by rules."""
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "")


@dataclass(frozen=True)
class Said:
    """What one connection has said so far.

    Attributes
    ----------
    config : the name of the configuration.
    description, body_part, station : of the header; empty where it does not say.
    parameters : as texts.
    """

    config: str = ""
    description: str = ""
    body_part: str = ""
    station: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)

    def with_config(self, name: str) -> Said:
        """Return this with a configuration's name, with or without ``.xml``."""
        return replace(self, config=name.strip().removesuffix(".xml").removesuffix(".json"))

    def with_header(self, text: str) -> Said:
        """Return this with what a header says of the measurement.

        Raises
        ------
        InputError
            If it is no XML.
        """
        root = parse_xml(text)

        def first(*names: str) -> str:
            for name in names:
                for element in root.iter():
                    if element.tag.rpartition("}")[2] == name and (element.text or "").strip():
                        return (element.text or "").strip()
            return ""

        return replace(
            self,
            description=first("seriesDescription", "protocolName"),
            body_part=first("bodyPartExamined"),
            station=first("stationName"),
        )

    def with_json(self, text: str) -> Said | None:
        """Return this with the parameters of a text; None if it holds none."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        parameters = found.get("parameters") if isinstance(found, dict) else None
        if not isinstance(parameters, dict):
            return None
        return replace(
            self,
            parameters={**self.parameters, **{str(n): _text(v) for n, v in parameters.items()}},
        )


@dataclass(frozen=True)
class Wish:
    """What the parameters ask for.

    Attributes
    ----------
    rule : name of the only rule to follow, if one is named; empty for those that fit.
    structures, k : in place of the rule's; None for those.
    returned : what to answer.
    """

    rule: str
    structures: tuple[str, ...] | None
    k: int | None
    returned: Returned

    @classmethod
    def of(cls, said: Said, rules: tuple[str, ...], returned: Returned) -> Wish:
        """Read the parameters.

        Parameters
        ----------
        rules : names of all rules; a configuration of one's name asks for that one alone.
        returned : what is answered by default.

        Raises
        ------
        InputError
            Naming the parameter that cannot be followed.
        """
        given = said.parameters
        structures = tuple(
            name.strip() for name in given.get("structures", "").split(",") if name.strip()
        )
        k = given.get("k", "").strip()
        if k and not (k.isascii() and k.isdigit() and 0 < int(k) < 1000):
            raise InputError(f"the parameter k is a number of exemplars, 1 or more, got '{k}'.")
        chosen = given.get("config", "")
        named = [name for name in (chosen, said.config) if name in rules]
        return cls(
            named[0] if named else "",
            structures or None,
            int(k) if k else None,
            Returned(
                **{
                    name: _truth(name, given[name]) if name in given else getattr(returned, name)
                    for name in Returned.model_fields
                }
            ),
        )


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value)


def _truth(name: str, value: str) -> bool:
    told = value.strip().casefold()
    if told not in _TRUE + _FALSE:
        raise InputError(f"the parameter {name} is true or false, got '{value}'.")
    return told in _TRUE
