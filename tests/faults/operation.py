"""What an operation is to the campaign: how it begins, what it does, what is there afterwards."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main

from recallseg.cli import main

# The tree of all commands takes most of a case; forked processes share one.
typer.main.get_command = functools.cache(typer.main.get_command)

__all__ = ["CommandError", "Operation", "chosen", "command", "names"]


class CommandError(Exception):
    """A command ended with another exit status than 0; the text is what it said."""


@dataclass(frozen=True)
class Operation:
    """Something that writes; the callables take the folder below which it all happens.

    ``partial`` tells whether a state is on the way to the one after, where an operation of many
    parts keeps what it has done. ``seconds`` is how long one case may take; below ``keeps`` there
    may be more than there is without faults.
    """

    name: str
    prepare: Callable[[Path], None]
    run: Callable[[Path], Any]
    state: Callable[[Path], Any]
    partial: Callable[[Any, Any], bool] = lambda state, after: False
    seconds: int = 300
    keeps: str = ""


def command(*arguments: str) -> Callable[[Path], None]:
    """Run ``recallseg`` in this process; ``{root}`` in an argument is the folder."""

    def run(root: Path) -> None:
        said = io.StringIO()
        values = [argument.replace("{root}", str(root)) for argument in arguments]
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            sys.argv = ["recallseg", *values]
            try:
                main()
            except SystemExit as end:
                if end.code:
                    raise CommandError(f"exit status {end.code}: {said.getvalue()}") from None

    return run


def chosen(only: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """Return the names that were asked for: those that are it, or else have it; None: all."""
    return [
        name
        for name in names
        if only is None
        or any(part == name or (part not in names and part in name) for part in only)
    ]


def names(root: Path) -> set[str]:
    """Return what is below a folder, by relative name."""
    return {
        os.path.relpath(os.path.join(place, name), root)
        for place, folders, files in os.walk(root)
        for name in (*folders, *files)
    }
