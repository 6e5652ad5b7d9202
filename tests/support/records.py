"""Records, held to the schema that is published."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "record.json"


@cache
def _validator() -> Any:
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def check_record(record: Any) -> None:
    """Raise jsonschema.ValidationError unless a record is as the schema says."""
    _validator().validate(record)
