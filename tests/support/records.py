"""Records, held to the schema that is published."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "record.json"


@cache
def _validator(part: str = "") -> Any:
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    if part:
        schema = {"$ref": f"#/$defs/{part}", "$defs": schema["$defs"]}
    return Draft202012Validator(schema)


def check_record(record: Any) -> None:
    """Raise jsonschema.ValidationError unless a record is as the schema says."""
    _validator().validate(record)


def check_record_part(name: str, told: Any) -> None:
    """Raise jsonschema.ValidationError unless a field of a record is as the schema says."""
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator({**schema["properties"][name], "$defs": schema["$defs"]}).validate(told)


def check_head(told: Any) -> None:
    """Raise jsonschema.ValidationError unless what a record tells of a head is as it says."""
    _validator("head").validate(told)
