"""The command line, from the commands themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import typer
from text import cell, flowing

from recallseg import cli

TAIL = re.compile(r"(.*?)\s*(?:\[([^\[\]]*)\])?", re.DOTALL)
"""What --help says of a parameter, and its bounds and default in brackets behind it."""

TYPES = {
    "<int range>": "N",
    "<int>": "N",
    "<float range>": "X",
    "<float>": "X",
    "<path>": "PATH",
    "<file>": "PATH",
    "<str>": "TEXT",
    "<list[str]>": "TEXT",
    "<list[path]>": "PATH",
    "<list[Path]>": "PATH",
}
"""What Typer calls types, and what a person would."""

__all__ = ["command_pages", "commands", "status_page"]


def commands() -> Iterator[tuple[str, Any]]:
    """Yield every command and group with its full name, as it is typed."""
    yield from _walked("recallseg", typer.main.get_command(cli.app))


def _walked(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for each, inner in getattr(command, "commands", {}).items():
        if name == "recallseg" and each in cli.LAZY:
            inner = cli.lazy_command(each)
        if not inner.hidden:
            yield from _walked(f"{name} {each}", inner)


def command_pages() -> dict[str, str]:
    """Return the page of all commands."""
    found = list(commands())
    out = [
        "# Commands\n",
        "Options of `recallseg` itself stand before the command, `--debug` anywhere. Every command "
        "has `--help`.\n",
        "| | |",
        "|---|---|",
    ]
    for name, command in found[1:]:
        if not getattr(command, "commands", None):
            out.append(f"| [`{name}`](#{_anchor(name)}) | {cell(_first(command))} |")
    out.append("")
    for name, command in found:
        out += [f"{'##' if name.count(' ') < 2 else '###'} {name} {{#{_anchor(name)}}}\n"]
        if command.help:
            out += [flowing(command.help), ""]
        if not getattr(command, "commands", None):
            out += ["```text", _usage(name, command), "```", ""]
        context = command.context_class(command, info_name=name)
        rows = [_row(each, context) for each in command.params if not _is_help(each)]
        rows = [row for row in rows if row]
        if rows:
            out += ["| | default | |", "|---|---|---|", *rows, ""]
    return {"reference/commands.md": "\n".join(out)}


def status_page() -> str:
    """Return the page of exit statuses, as the command line's own module states them."""
    (text,) = re.findall(r"^Exit status: (.+?)\.$", inspect.getdoc(cli) or "", re.MULTILINE)
    rows = [each.strip().split(" ", 1) for each in text.split(",")]
    out = ["# Exit status\n", "| status | meaning |", "|---|---|"]
    out += [f"| {status} | {meaning} |" for status, meaning in rows]
    out += [
        "",
        "A command that could not do a part of what it was asked for (one image of a folder that "
        "cannot be read) does the rest, names the part, and ends with 1. The statuses of calls "
        "from C are in [recallseg.h](c.md#errors-and-versions).",
        "",
    ]
    return "\n".join(out)


def _anchor(name: str) -> str:
    return name.removeprefix("recallseg ").replace(" ", "-")


def _first(command: Any) -> str:
    return flowing(command.help or "").split("\n\n")[0]


def _is_help(parameter: Any) -> bool:
    return parameter.param_type_name == "option" and "--help" in parameter.opts


def _usage(name: str, command: Any) -> str:
    context = command.context_class(command, info_name=name)
    return " ".join([name, *command.collect_usage_pieces(context)])


def _row(parameter: Any, context: Any) -> str:
    """Return what ``--help`` says of a parameter, as a row of a table."""
    record = parameter.get_help_record(context)
    if record is None:
        return ""
    shown, said = record
    text, bounds = TAIL.fullmatch(flowing(said or "")).groups()  # type: ignore[union-attr]
    notes = [each for each in (bounds or "").split("; ") if each]
    default = [each.removeprefix("default: ") for each in notes if each.startswith("default: ")]
    rest = [each for each in notes if not each.startswith("default: ") and each != "required"]
    default += ["required"] if "required" in notes else []
    if parameter.param_type_name == "argument":
        shown = shown.split(" ")[0]
    for typed, word in TYPES.items():
        shown = shown.replace(typed, word)
    rest = [
        re.sub(r"^x([<>]=?)", r"\1 ", each).replace(">=", "≥").replace("<=", "≤") for each in rest
    ]
    value = cell(f"`{shown}`")
    behind = f" ({', '.join(rest)})" if rest else ""
    return f"| {value} | {cell(', '.join(default))} | {cell(text + behind)} |"
