"""Commands that segment have one set of options."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from recallseg.cli import app
from recallseg.commands.asking import Asking, Handling


def options(*path: str) -> dict[str, Any]:
    """Name, default and help of a command's options, by what they fill."""
    command: Any = get_command(app)
    for name in path:
        command = command.commands[name]
    return {p.name: (p.opts, p.default, getattr(p, "help", None)) for p in command.params}


@pytest.mark.parametrize("path", [("segment",), ("watch",), ("library", "calibrate")])
def test_how_to_segment_is_asked_alike_everywhere(path: tuple[str, ...]) -> None:
    groups = (Asking,) if path[0] == "library" else (Asking, Handling)
    names = [field.name for group in groups for field in fields(group)]
    found, reference = options(*path), options("segment")
    assert {name: found[name] for name in names} == {name: reference[name] for name in names}
    assert not {"asking", "handling"} & set(found)


def test_what_a_watcher_is_asked_is_parsed_first(tmp_path: Path) -> None:
    answer = CliRunner().invoke(
        app,
        ["watch", str(tmp_path), "--library", "none", "--output", "out", "--structures", "a,a"],
    )
    assert answer.exit_code == 2
    assert "names something twice" in answer.output
