"""``recallseg library whois`` and ``anonymise``: who exemplars are of."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from recallseg.commands.common import JsonOption, LibraryArgument, emit_json, say

__all__ = ["anonymise", "whois"]


def whois(
    library: LibraryArgument,
    keys: Annotated[
        Optional[list[str]], typer.Argument(metavar="KEY...", help="Exemplars; all by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what keys stand for: names, tags, groups, from the table that its owner alone reads."""
    from recallseg.runtime.library import Library

    with Library.open(library) as opened:
        wanted = keys or [exemplar.key for exemplar in opened]
        found = [opened.whois(key) for key in wanted]
    if as_json:
        emit_json([identity.to_json() for identity in found])
        return
    for identity in found:
        tags = " ".join(f"{name}={value}" for name, value in identity.tags.items())
        parts = (
            identity.name or "(no name was told)",
            tags,
            f"group {identity.group}" if identity.group else "",
            f"formerly '{identity.former}'" if identity.former else "",
        )
        say(f"{identity.key}: {'; '.join(part for part in parts if part)}")


def anonymise(library: LibraryArgument, as_json: JsonOption = False) -> None:
    """Give exemplars keys that say nothing, and hash tags that identify.

    For libraries of earlier versions. 'whois' knows the former keys. The library's digest changes,
    since keys and tags are part of it; memories and calibrations stay.
    """
    from recallseg.runtime.library import Library

    with Library.open(library, mode="write") as opened:
        report = opened.anonymise()
    if as_json:
        emit_json({**vars(report), "tags": dict(report.tags)})
        return
    tags = ", ".join(f"{name} ({count})" for name, count in report.tags.items()) or "none"
    say(
        f"{report.exemplars} exemplars: {report.keys} keys replaced, tags hashed: {tags}; digest "
        f"{report.digest_before[:12]} is now {report.digest[:12]}"
    )
    if report.unknown:
        say(
            f"{report.unknown} values were hashed by who made the library, and stay; new ones are "
            "hashed with a secret of your own"
        )
    if report.calibrations:
        say(f"calibrations moved to the hashed tags: {', '.join(report.calibrations)}")
    if report.removed:
        say(f"calibrations to be made again: {', '.join(report.removed)}")
