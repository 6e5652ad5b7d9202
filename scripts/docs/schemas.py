"""JSON that is written, from the published schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from text import cell

__all__ = ["schemas_page"]

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"


def schemas_page() -> str:
    """Return the page of all schemas."""
    out = [
        "# Records\n",
        "Everything that is written has a `format_version`, and a reader refuses one that it does "
        "not know. Tests hold whatever is written to these schemas.\n",
    ]
    for path in sorted(SCHEMAS.glob("*.json")):
        schema = json.loads(path.read_text(encoding="utf-8"))
        out += [f"## {schema['title']}\n", schema.get("description", ""), ""]
        out += [f"[{path.name}](../schemas/{path.name})\n"]
        out += ["| field | | |", "|---|---|---|", *_rows(schema, schema, ""), ""]
    return "\n".join(out)


def _rows(schema: dict[str, Any], whole: dict[str, Any], before: str) -> list[str]:
    out = []
    needed = schema.get("required", ())
    for name, each in schema.get("properties", {}).items():
        each = _followed(each, whole)
        words = _words(each, whole) + ("" if name in needed or before else ", optional")
        out.append(f"| `{before}{name}` | {cell(words)} | {cell(each.get('description', ''))} |")
        if before.count(".") < 2:
            inner = each
            suffix = "."
            if each.get("type") == "array" and "items" in each:
                inner, suffix = _followed(each["items"], whole), "[]."
            elif isinstance(each.get("additionalProperties"), dict):
                inner, suffix = _followed(each["additionalProperties"], whole), ".*."
            out += _rows(inner, whole, f"{before}{name}{suffix}")
    return out


def _followed(schema: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        found: Any = whole
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return {**found, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def _words(schema: dict[str, Any], whole: dict[str, Any]) -> str:
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(each)}`" for each in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            parts = [_words(_followed(each, whole), whole) for each in schema[key]]
            return " or ".join(dict.fromkeys(parts))
    kind = schema.get("type", "value")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)
