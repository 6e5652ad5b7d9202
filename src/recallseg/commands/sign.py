"""``recallseg sign ...``: say who made a bundle or a file, and check who did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from recallseg.commands.common import JsonOption, emit_json, note, say
from recallseg.engines.reading import read_file

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Sign bundles and files, and check signatures.")

KeyOption = Annotated[Path, typer.Option("--key", help="Private key that 'sign key' made.")]


@app.command()
def key(
    file: Annotated[Path, typer.Argument(help="New file for the private key.")],
    name: Annotated[
        Optional[str], typer.Option(help="What its owner is called.", show_default="the file's")
    ] = None,
) -> None:
    """Make a key: FILE to keep, FILE.pub for those who shall trust it. Prints the public line."""
    from recallseg.engines.signing import create_key

    say(create_key(file, name or "").to_line())
    note(f"keep {file} to yourself; {file}.pub goes into the trusted keys of others")


@app.command()
def bundle(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.")],
    key: KeyOption,
) -> None:
    """Sign a bundle, after every file was compared with its digest."""
    from recallseg.engines.signing import SigningKey, sign_bundle

    signer = SigningKey.read(key)
    sign_bundle(folder, signer)
    note(f"{folder} signed by {signer.public.name} {signer.public.id}")


@app.command()
def file(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="For instance a release.")],
    key: KeyOption,
) -> None:
    """Sign any file; the signature goes to FILE.sig."""
    from recallseg.engines.signing import SigningKey, sign_file

    note(f"wrote {sign_file(path, SigningKey.read(key))}")


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="Folder of a bundle, or a file with its FILE.sig.")],
    trust: Annotated[Path, typer.Option("--trust", metavar="KEYS", help="File of public keys.")],
    as_json: JsonOption = False,
) -> None:
    """Say who signed it; exit status 1 if no trusted key did, or it was changed since."""
    from recallseg.engines.bundle import Bundle
    from recallseg.engines.manifest import read_manifest
    from recallseg.engines.signing import check_bundle, check_file, read_trusted

    keys = read_trusted(trust)
    if path.is_dir():
        Bundle(path, read_manifest(path, trust=keys)).check_files()
        signer = check_bundle(path, read_file(path / "manifest.json"), keys)
    else:
        signer = check_file(path, keys)
    if as_json:
        emit_json({"path": str(path), "signer": {"name": signer.name, "id": signer.id}})
    else:
        say(f"{path}: signed by {signer.name} {signer.id}")
