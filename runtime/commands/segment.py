"""``recallseg segment``: image files in, label maps and their records out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from recallseg.engines.errors import InputError
from recallseg.runtime.commands.common import (
    AuditOption,
    EngineOption,
    JsonOption,
    LibraryArgument,
    PrecisionOption,
    ThreadsOption,
    emit_json,
    note,
    parsed,
    progress_bar,
    say_notice,
    split_list,
)

__all__ = ["segment"]


def segment(
    library: LibraryArgument,
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Images, or folders of them.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for NAME.mask.png and NAME.json.")],
    k: Annotated[int, typer.Option("--k", min=1, help="Exemplars to recall.")] = 4,
    structures: Annotated[
        Optional[str], typer.Option(help="Which, in the order of label values.", show_default="all")
    ] = None,
    engine: EngineOption = "onnxruntime-cpu",
    precision: PrecisionOption = "fp32",
    threads: ThreadsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    audit: AuditOption = None,
    as_json: JsonOption = False,
) -> None:
    """Segment images by recalling the library's exemplars."""
    from recallseg.runtime.audit import AuditLog
    from recallseg.runtime.formats.images import read_image
    from recallseg.runtime.library import Library
    from recallseg.runtime.outputs import mask_file, write_result
    from recallseg.runtime.segmenter import Segmenter

    names = None if structures is None else parsed(split_list, structures, "--structures")
    jobs = _jobs(paths, output)
    if not overwrite:
        _refuse_existing(jobs)
    log = None if audit is None else AuditLog(audit)
    records: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    with Library.open(library) as opened:
        segmenter = Segmenter(
            opened, k=k, structures=names, engine=engine, precision=precision, threads=threads
        )
        say_notice(segmenter.bundle.notice)
        with progress_bar("Segmenting", len(jobs)) as step:
            for path, base in jobs:
                try:
                    image = read_image(path)
                    result = segmenter.segment(image)
                except InputError as error:
                    failed[str(path)] = str(error)
                else:
                    if log is not None:
                        log.record(image, result)
                    record = write_result(base, result, path.name)
                    records.append(record)
                    if not as_json:
                        typer.echo(f"{mask_file(base)}  {result!r}")
                step(path.name)
    if as_json:
        emit_json({"results": records, "failed": failed})
    for path_text, why in failed.items():
        note(f"failed: {path_text}: {why}")
    if failed:
        raise typer.Exit(1)


def _jobs(paths: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """Return image files with the path, less its suffix, that their outputs get below ``output``.

    Raises
    ------
    InputError
        If a path is not there, a folder has no image, or two outputs would have the same name.
    """
    from recallseg.runtime.formats.images import is_image
    from recallseg.runtime.outputs import MASK_SUFFIX, mask_file, output_base

    jobs: list[tuple[Path, Path]] = []
    for path in paths:
        if not path.is_dir():
            jobs.append((path, output_base(output, Path(path.name))))
            continue
        inside = [
            file
            for file in sorted(path.rglob("*"))
            if is_image(file)
            and not file.stem.endswith(MASK_SUFFIX)
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not inside:
            raise InputError(
                f"there is no image in {path} (label maps NAME.mask.png do not count)."
            )
        for file in inside:
            jobs.append((file, output_base(output, file.relative_to(path))))
    taken: dict[str, Path] = {}
    for path, base in jobs:
        other = taken.setdefault(str(base).casefold(), path)
        if other is not path:
            raise InputError(
                f"{other} and {path} would both be written to {mask_file(base)}. Rename one, "
                "or segment them into different folders."
            )
    return jobs


def _refuse_existing(jobs: Sequence[tuple[Path, Path]]) -> None:
    from recallseg.runtime.outputs import mask_file, record_file

    for _, base in jobs:
        for target in (mask_file(base), record_file(base)):
            if target.exists():
                raise InputError(
                    f"{target} exists already; nothing was written. Choose another --output, or "
                    "give --overwrite."
                )
