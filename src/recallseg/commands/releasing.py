"""``recallseg library release|install|diff``: libraries as signed files, for a fleet of devices."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from recallseg.commands.common import (
    EngineOption,
    JsonOption,
    LibraryArgument,
    PrecisionOption,
    ThreadsOption,
    counted,
    emit_json,
    note,
    parsed,
    progress_bar,
    say,
)
from recallseg.engines import defaults
from recallseg.engines.errors import InputError
from recallseg.engines.reading import read_file

if TYPE_CHECKING:
    from recallseg.engines.signing import PublicKey
    from recallseg.runtime.library import Library
    from recallseg.runtime.library.releases import Release

__all__ = ["diff", "install", "release"]

TrustOption = Annotated[
    Optional[Path],
    typer.Option(
        help="File of public keys, of which one must have signed it.",
        show_default="$RECALLSEG_TRUST, or 'recallseg --trust'",
    ),
]


def release(
    library: LibraryArgument,
    version: Annotated[str, typer.Option(help="MAJOR.MINOR.PATCH.")],
    key: Annotated[Path, typer.Option(help="Private key that 'recallseg sign key' made.")],
    output: Annotated[
        Optional[Path], typer.Option(help="File to write.", show_default="NAME-VERSION.release")
    ] = None,
    images: Annotated[
        bool, typer.Option("--images", help="Take the annotated images along.")
    ] = False,
    evaluate: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FOLDER", help="Annotated images that were held out: measure on them."
        ),
    ] = None,
    labels: Annotated[
        Optional[str], typer.Option(help="Of --evaluate: structures by label value, 1=liver,...")
    ] = None,
    k: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            help="Of --evaluate: most exemplars to recall.",
            show_default=str(defaults.K),
        ),
    ] = None,
    sbom: Annotated[
        Optional[Path],
        typer.Option(help="What 'recallseg sbom' wrote, to take along.", show_default="none"),
    ] = None,
    engine: EngineOption = defaults.ENGINE,
    precision: PrecisionOption = defaults.PRECISION,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a library to one signed file; others install it and check every byte."""
    from recallseg.engines.signing import SigningKey
    from recallseg.runtime.library import Library
    from recallseg.runtime.library.releases import version_number

    parsed(version_number, version, "--version")
    if evaluate is None and (labels is not None or k is not None):
        raise typer.BadParameter("--labels and --k go with --evaluate FOLDER.", param_hint=[])
    signer = SigningKey.read(key)
    bill = None if sbom is None else parsed(_read_json, str(sbom), "--sbom")
    with Library.open(library, engine=engine, precision=precision, threads=threads) as opened:
        target = output or Path(f"{opened.path.resolve().name}-{version}.release")
        if target.is_dir():
            raise typer.BadParameter(f"{target} is a folder.", param_hint="--output")
        measured = (
            None if evaluate is None else _evaluate(opened, evaluate, labels, k or defaults.K)
        )
        with progress_bar("Comparing", len(opened) + len(opened.retired)) as step:
            described = opened.release(
                target,
                version=version,
                key=signer,
                images=images,
                evaluation=measured,
                sbom=bill,
                progress=counted(step),
            )
    if as_json:
        emit_json({"file": str(target), **_short(described)})
    else:
        _tell(described, f"{target}: {target.stat().st_size:,} bytes")


def install(
    file: Annotated[
        Optional[Path], typer.Argument(metavar="FILE", help="Release; none with --rollback.")
    ] = None,
    into: Annotated[
        Path, typer.Option("--into", metavar="FOLDER", help="Folder of this library's releases.")
    ] = Path(),
    trust: TrustOption = None,
    older: Annotated[
        bool, typer.Option("--older", help="It may take the place of a newer one.")
    ] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Use the release again that was in use before.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a release, put it beside those that are there, and in use as FOLDER/current."""
    from recallseg.runtime.library.installing import CURRENT, install, roll_back
    from recallseg.runtime.library.releases import read_release

    if rollback is (file is not None):
        raise typer.BadParameter("give a FILE to install, or --rollback.")
    if file is None:
        described = roll_back(into)
    else:
        keys = _trusted(trust)
        with progress_bar("Installing", len(read_release(file, keys).files)) as step:
            described = install(file, into, keys, older=older, progress=counted(step))
    if as_json:
        emit_json({"library": str(into / CURRENT), **_short(described)})
    else:
        _tell(described, f"in use: {into / CURRENT}")


def diff(
    before: Annotated[Path, typer.Argument(metavar="A", help="Library, or release.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Library, or release.")],
    trust: TrustOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which exemplars B has that A has not, and what became of Dice on the same cases."""
    from recallseg.runtime.library.comparing import compare

    with _opened(before, trust) as (old, was), _opened(after, trust) as (new, now):
        found = compare(old, new, (was, now))
    if as_json:
        emit_json(found.to_json())
        return
    for sign, keys, why in (
        ("+", found.added, ""),
        ("-", found.removed, ""),
        ("-", found.retired, ": retired, and still there"),
        ("+", found.reinstated, ": in use again"),
    ):
        for key in keys:
            say(f"{sign} {key}{why}")
    for key, other in found.renamed.items():
        say(f"~ {key}: its key is {other}")
    for key, parts in found.changed.items():
        say(f"~ {key}: other {' and '.join(parts)}")
    for sign, names in (("+", found.structures_added), ("-", found.structures_removed)):
        for name in names:
            say(f"{sign} structure {name}")
    if found.bundle is not None:
        say(f"~ bundle: {found.bundle[0][:12]} -> {found.bundle[1][:12]}")
    for name, (was_so, is_so) in found.settings.items():
        say(f"~ {name}: {was_so} -> {is_so}")
    if not found:
        say("no difference")
    for name, dice in found.dice.items():
        say(f"  Dice of {name}: {dice.before:.3f} -> {dice.after:.3f} ({dice.cases} cases)")
    if found.uncompared:
        note(f"Dice was not compared: {found.uncompared}.")


@contextmanager
def _opened(path: Path, trust: Path | None) -> Iterator[tuple[Library, Mapping[str, Any] | None]]:
    """Open a library, or a release of one; yield it with its evaluation, where there is one."""
    from recallseg.runtime.library import Library
    from recallseg.runtime.library.installing import installed, installed_as
    from recallseg.runtime.library.releases import unpack

    used: Release | None
    with ExitStack() as stack:
        if path.is_file():
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()), "library")
            used, path = unpack(path, work, _trusted(trust)), work
        elif (used := installed(path)) is not None:
            path = path / used.version
        else:
            used = installed_as(path)
        library = stack.enter_context(Library.open(path))
        # One that was changed since is not what was evaluated.
        same = used is not None and used.library == library.digest
        yield library, used.evaluation if used is not None and same else None


def _trusted(path: Path | None) -> Sequence[PublicKey]:
    from recallseg.engines.signing import read_trusted, trusted_keys

    keys = trusted_keys() if path is None else read_trusted(path)
    if keys is None:
        raise typer.BadParameter("name the keys that may have signed it.", param_hint="--trust")
    return keys


def _evaluate(library: Library, folder: Path, labels: str | None, k: int) -> dict[str, Any]:
    from recallseg.runtime.formats.annotations import find_annotations
    from recallseg.runtime.formats.pairs import parse_labels
    from recallseg.runtime.reports.annotated_sources import sources_of
    from recallseg.runtime.reports.evaluation import evaluate
    from recallseg.runtime.reports.released import released
    from recallseg.runtime.segmenting.segmenter import Segmenter

    by_label = None if labels is None else parsed(parse_labels, labels, "--labels")
    found = find_annotations(folder, None)
    sources = sources_of(found, by_label)
    names = library.structures
    with progress_bar("Evaluating", len(found)) as step:
        evaluation = evaluate(
            library,
            sources,
            names,
            [k],
            lambda k: Segmenter(library, k=k, structures=names),
            progress=step,
        )
    for name, why in evaluation.failures.items():
        note(f"failed: {name}: {why}")
    return released(evaluation)


def _read_json(path: str) -> dict[str, Any]:
    try:
        found = json.loads(read_file(Path(path)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is no JSON object, as 'recallseg sbom' writes.")
    return found


def _short(described: Release) -> dict[str, Any]:
    data = described.to_json()
    return {name: data[name] for name in data if name not in ("files", "sbom")}


def _tell(described: Release, where: str) -> None:
    note(
        f"{described.name} {described.version}: {described.exemplars} exemplars of "
        f"{', '.join(described.structures)}, {'with' if described.images else 'without'} images"
    )
    for name, dice in (described.evaluation or {}).get("dice", {}).items():
        note(f"Dice of {name}: {dice['mean']:.3f} ({dice['cases']} held out)")
    say(where)
