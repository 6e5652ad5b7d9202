"""The configuration of services, from its models."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticUndefined
from text import attributes, cell, flowing

from recallseg.runtime.services.sections import sections_in
from recallseg.runtime.services.settings import EXAMPLES, Configuration, example

__all__ = ["configuration_page", "sections"]


def sections() -> dict[str, type[BaseModel]]:
    """Return every section by its name in the file; the empty name is the file's top."""
    found: dict[str, type[BaseModel]] = {}

    def walk(where: str, model: type[BaseModel]) -> None:
        found[where] = model
        for name, field in model.model_fields.items():
            inner = sections_in(field.annotation)
            many = "dict" in str(field.annotation) or "tuple" in str(field.annotation)
            for each in inner:
                suffix = ".NAME" if "dict" in str(field.annotation) else "[]" if many else ""
                kind = f" ({_kind(each)})" if len(inner) > 1 else ""
                walk(f"{where}.{name}{suffix}{kind}".lstrip("."), each)

    walk("", Configuration)
    return found


def configuration_page() -> str:
    """Return the page of all settings."""
    out = [
        "# Configuration of services\n",
        "One TOML file for `recallseg node`, `mrd` and `igtl`. `recallseg config check FILE` tells "
        "all that is wrong with one. Any value can come from the environment: "
        "`RECALLSEG__NODE__PORT=104` is `port` of `[node]`. Relative paths are meant from the "
        "file's folder.\n",
    ]
    comments = _comments()
    for where, model in sections().items():
        out.append(f"## {_heading(where)}\n")
        if where:
            out += [flowing(model.__doc__ or "").split("\n\nAttributes")[0], ""]
        said = {}
        for base in reversed(model.__mro__):
            said |= attributes(base.__dict__.get("__doc__") or "")
        rows = []
        for name, field in model.model_fields.items():
            if sections_in(field.annotation):
                continue
            default = (
                "required"
                if field.is_required()
                else _shown(field.get_default(call_default_factory=True))
            )
            text = said.get(name) or comments.get((where.split(".")[-1], name)) or ""
            kind = _type(model, name)
            rows.append(f"| `{name}` | {cell(kind)} | {cell(default)} | {cell(text)} |")
        if rows:
            out += ["| setting | value | default | |", "|---|---|---|---|", *rows, ""]
    for path in sorted(EXAMPLES.glob("*.toml")):
        out += [
            f"## Example: {path.stem}.toml\n",
            "```toml",
            example(path.stem).rstrip(),
            "```",
            "",
        ]
    return "\n".join(out)


def _heading(where: str) -> str:
    if not where:
        return "At the top"
    name, kind = re.sub(r" \(.+\)", "", where), re.findall(r" \((.+)\)", where)
    table = (
        f"[[{name.removesuffix('[]')}]]" if name.endswith("[]") else f"[{name.replace('[]', '')}]"
    )
    return f"`{table}`" + "".join(f", {each}" for each in kind)


def _kind(model: type[BaseModel]) -> str:
    kinds = model.model_fields["type"].annotation
    return f"type = {json.dumps(kinds.__args__[0])}" if kinds is not None else model.__name__


def _shown(value: Any) -> str:
    if value is None or value is PydanticUndefined or value == () or value == {}:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (str, int, float)):
        return f"`{json.dumps(value)}`"
    if isinstance(value, tuple):
        return f"`{json.dumps(list(value))}`"
    return f"`{value}`"


def _type(model: type[BaseModel], name: str) -> str:
    """Return what may stand there, in words, from the field's JSON schema."""
    field = model.model_fields[name]
    metadata = tuple(field.metadata)
    annotation: Any = field.annotation
    if metadata:
        annotation = Annotated[(annotation, *metadata)]
    return _words(TypeAdapter(annotation).json_schema())


def _words(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return "table"
    if "anyOf" in schema:
        parts = [_words(each) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(each)}`" for each in schema["enum"])
    kind = schema.get("type", "value")
    if kind == "array":
        return f"list of {_words(schema.get('items', {}))}"
    if kind == "object":
        return "table"
    words = {"integer": "whole number", "string": "text", "boolean": "`true`, `false`"}.get(
        kind, kind
    )
    if schema.get("format") == "path":
        words = "path"
    bounds = [
        f"{sign} {schema[key]:,}"
        for key, sign in (
            ("exclusiveMinimum", ">"),
            ("minimum", "≥"),
            ("exclusiveMaximum", "<"),
            ("maximum", "≤"),
        )
        if key in schema
    ]
    if "pattern" in schema:
        bounds.append(f"like `{schema['pattern']}`")
    return words + (f", {', '.join(bounds)}" if bounds else "")


def _comments() -> dict[tuple[str, str], str]:
    """Return what examples say behind a setting, by the last part of its section and its name."""
    found: dict[tuple[str, str], str] = {}
    for path in sorted(EXAMPLES.glob("*.toml")):
        section = ""
        for line in path.read_text(encoding="utf-8").splitlines():
            line = line.removeprefix("# ")
            if line.startswith("["):
                section = line.split("]")[0].strip("[").split(".")[-1]
            elif " = " in line and "#" in line:
                name, said = line.split(" = ")[0].strip(), line.rsplit("#", 1)[1].strip()
                found.setdefault((section, name), said)
    return found
