"""JSON that is written, held to the schemas that are published."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema_rs import Draft202012Validator, Registry, meta

__all__ = ["check_head", "check_record", "check_record_part", "check_written", "dumps_checked"]

_dumps = json.dumps
SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"


@cache
def _schemas() -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}


def _readable(value: Any) -> Any:
    """Return it as JSON that is text: of a file's name, bytes that are none are replaced."""
    return json.loads(_dumps(value, ensure_ascii=False).encode(errors="replace"))


@cache
def _validator(name: str, part: str = "") -> Any:
    schema = _schemas()[f"{name}.json"]
    meta.validate(schema)
    if part:
        schema = {"$ref": f"#/$defs/{part}", "$defs": schema["$defs"]}
    known = [(each.get("$id", f"json-schema:///{file}"), each) for file, each in _schemas().items()]
    return Draft202012Validator(schema, registry=Registry(known))


def check_record(record: Any) -> None:
    """Raise jsonschema_rs.ValidationError unless a record is as the schema says."""
    _validator("record").validate(_readable(record))


def check_record_part(name: str, told: Any) -> None:
    """Raise jsonschema_rs.ValidationError unless a field of a record is as the schema says."""
    schema = _schemas()["record.json"]
    Draft202012Validator({**schema["properties"][name], "$defs": schema["$defs"]}).validate(
        _readable(told)
    )


def check_head(told: Any) -> None:
    """Raise jsonschema_rs.ValidationError unless what a record tells of a head is as it says."""
    _validator("record", "head").validate(_readable(told))


def check_written(value: Any) -> None:
    """Raise jsonschema_rs.ValidationError if a value says which schema it follows, and does not.

    KeyError if it says one that is not published.
    """
    if not isinstance(value, dict):
        return
    said = value.get("schema")
    if value.get("format") == "recallseg-bench":
        _validator("benchmark").validate(_readable(value))
    elif isinstance(said, str) and said.startswith("recallseg-"):
        _validator(said.removeprefix("recallseg-").partition("/")[0]).validate(_readable(value))


def dumps_checked(value: Any, *args: Any, **named: Any) -> str:
    """Do as ``json.dumps``, which it stands in for: what our modules write is looked at."""
    text = _dumps(value, *args, **named)
    if str(sys._getframe(1).f_globals.get("__name__")).startswith("recallseg."):
        check_written(json.loads(text))
    return text
