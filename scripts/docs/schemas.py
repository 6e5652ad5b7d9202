"""JSON that is written: its schemas in docs/schemas, and their page.

    python scripts/docs/schemas.py    write those that are made from the source

Some are written by hand; those of classes and of the configuration are made from them.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, TypeAdapter
from text import attributes, cell, flowing

from recallseg.benchmarks.accuracy.report import AccuracyReport
from recallseg.benchmarks.makers.capi import OverheadReport
from recallseg.benchmarks.pixels import PixelsReport
from recallseg.benchmarks.schema import FORMAT, VERSION, Head, Report
from recallseg.benchmarks.streams import StreamReport
from recallseg.benchmarks.volumes import VolumesReport
from recallseg.runtime.library.comparing import SCHEMA as DIFFERENCE
from recallseg.runtime.library.comparing import Difference
from recallseg.runtime.services.doctor import SCHEMA, Diagnosis
from recallseg.runtime.services.settings import Configuration

__all__ = ["SCHEMAS", "generated", "schemas_page"]

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
REPORTS: dict[type[Head], str] = {
    AccuracyReport: "accuracy",
    OverheadReport: "capi",
    PixelsReport: "pixels",
    StreamReport: "stream",
    VolumesReport: "volumes",
}
"""Benchmarks that leave a file of their own, and the commands that do."""
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def generated() -> dict[str, dict[str, Any]]:
    """Return the schemas that are made from the source, by file name."""
    bench = {"format": {"const": FORMAT}, "version": {"const": VERSION}}
    healthy = {"type": "boolean", "description": "A real engine can run; all tests passed."}
    return {
        "benchmark.json": _titled(
            f"Benchmark (bench.json), version {VERSION}", _written(Report, bench)
        ),
        "configuration.json": _titled(
            "Configuration of services (TOML)", _described(Configuration)
        ),
        "diagnosis.json": _titled(
            f"Diagnosis ('doctor --json'), version {SCHEMA.rpartition('/')[2]}",
            _written(Diagnosis, {"schema": {"const": SCHEMA}}, {"healthy": healthy}),
        ),
        "difference.json": _titled(
            f"Difference ('library diff --json'), version {DIFFERENCE.rpartition('/')[2]}",
            _written(Difference, {"schema": {"const": DIFFERENCE}}),
        ),
        **dict(_reports()),
    }


def _reports() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield those of benchmarks that leave a file of their own."""
    for kind, command in REPORTS.items():
        name, version = kind.schema.removeprefix("recallseg-").split("/")
        file = f"{name.removeprefix('bench-')}.json"
        title = f"Benchmark ({file} of 'bench {command}'), version {version}"
        yield (
            f"{name}.json",
            _titled(title, _written(kind, {"schema": {"const": kind.schema}})),
        )


def _titled(title: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"$schema": DRAFT, "title": title, **schema}


def _written(
    kind: type, before: dict[str, Any], after: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the schema of a class with what else is written; all of it always is."""
    schema = _described(kind)
    schema["properties"] = {**before, **schema["properties"], **after}
    schema["required"] = [*schema["properties"]]
    return schema


def _described(kind: type) -> dict[str, Any]:
    """Return the schema of a class, with what docstrings say of each field."""
    schema = TypeAdapter(kind).json_schema(
        mode="validation" if issubclass(kind, BaseModel) else "serialization"
    )
    known = {each.__name__: each for each in _classes(kind)}
    for name, each in [("", schema), *schema.get("$defs", {}).items()]:
        _describe(each, known.get(name, kind))
    return schema


def _classes(kind: type) -> set[type]:
    """Return a class and those of ours that its fields, and theirs, are made of."""
    found, left = set[type](), [kind]
    while left:
        one = left.pop()
        if one in found:
            continue
        found.add(one)
        for base in one.__mro__:
            names = vars(sys.modules[base.__module__])
            for annotation in inspect.get_annotations(base).values():
                words = [names.get(word) for word in re.findall(r"\w+", str(annotation))]
                left += [w for w in words if isinstance(w, type) and "recallseg" in w.__module__]
    return found


def _describe(schema: dict[str, Any], kind: type) -> None:
    schema.pop("title", None)
    if "properties" not in schema:
        return
    said = {}
    for base in reversed(kind.__mro__):
        said |= attributes(base.__dict__.get("__doc__") or "")
    head = inspect.cleandoc(kind.__doc__ or "").partition("\n\nAttributes\n")[0]
    schema["description"] = " ".join(flowing(head).split())
    for name, each in schema["properties"].items():
        each.pop("title", None)
        if name in said:
            each["description"] = said[name]
    if not issubclass(kind, BaseModel):
        schema["additionalProperties"] = False
        schema["required"] = [*schema["properties"]]


def schemas_page() -> str:
    """Return the page of all schemas."""
    out = [
        "# Records\n",
        "Everything that is written for other programs says which schema it follows, and which "
        "version of it (`schema`; `format_version` of records; `format` and `version` of "
        "benchmarks). A reader refuses one that it does not know. Tests hold whatever is written "
        "to these.\n",
    ]
    for path in sorted(SCHEMAS.glob("*.json")):
        schema = json.loads(path.read_text(encoding="utf-8"))
        out += [f"## {schema['title']}\n", schema.get("description", ""), ""]
        out += [f"[{path.name}](../schemas/{path.name})\n"]
        out += ["| field | type | meaning |", "|---|---|---|", *_rows(schema, schema, ""), ""]
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
        file, _, place = schema["$ref"].partition("#/")
        if file:  # said there in full
            return {"type": "object", "description": f"As in {file}."}
        found: Any = whole
        for part in place.split("/"):
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


if __name__ == "__main__":
    for name, schema in generated().items():
        text = json.dumps(schema, indent=2, ensure_ascii=False)
        (SCHEMAS / name).write_text(text + "\n", encoding="utf-8")
