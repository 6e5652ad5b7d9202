"""``recallseg sbom``: everything that is installed and linked, as CycloneDX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from recallseg.commands.common import note, parsed, split_list
from recallseg.engines.durable import replace_file
from recallseg.runtime.services.sbom import make_sbom

__all__ = ["sbom"]


def sbom(
    output: Annotated[
        Optional[Path], typer.Option(help="File to write.", show_default="standard output")
    ] = None,
    extras: Annotated[
        str, typer.Option(help="Extras of recallseg in use; 'none' for none.")
    ] = "cpu",
    library: Annotated[
        Optional[list[Path]], typer.Option(help="Also list this library and what it links to.")
    ] = None,
    bundle: Annotated[
        Optional[list[str]],
        typer.Option(help="Also list this bundle: weights, graphs, digests; may be given again."),
    ] = None,
) -> None:
    """Write a bill of materials: packages, versions, licences, native libraries, bundles."""
    names = [] if extras == "none" else parsed(split_list, extras, "--extras")
    text = make_sbom(names, library or (), bundle or ())
    if output is None:
        typer.echo(text)
    else:
        replace_file(output, text.encode())
        note(f"wrote {output}")
