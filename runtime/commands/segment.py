"""``recallseg segment``: image files in, label maps and their records out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from recallseg.engines.errors import InputError
from recallseg.runtime.commands.common import (
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

MASK_SUFFIX = ".mask"


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
    as_json: JsonOption = False,
) -> None:
    """Segment images by recalling the library's exemplars."""
    from recallseg import __version__
    from recallseg.runtime.formats.images import read_image, write_atomically, write_label_map
    from recallseg.runtime.library import Library
    from recallseg.runtime.segmenter import Segmenter

    names = None if structures is None else parsed(split_list, structures, "--structures")
    jobs = _jobs(paths, output)
    if not overwrite:
        _refuse_existing(jobs)
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
                    result = segmenter.segment(read_image(path))
                except InputError as error:
                    failed[str(path)] = str(error)
                else:
                    mask = base.with_name(f"{base.name}{MASK_SUFFIX}.png")
                    record = {
                        "image": path.name,
                        "mask": mask.name,
                        "recallseg": __version__,
                        **result.to_json(),
                    }
                    mask.parent.mkdir(parents=True, exist_ok=True)
                    write_label_map(mask, result.label_map)
                    text = json.dumps(record, indent=1, ensure_ascii=False)
                    write_atomically(base.with_name(f"{base.name}.json"), text.encode())
                    records.append(record)
                    if not as_json:
                        typer.echo(f"{mask}  {result!r}")
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

    jobs: list[tuple[Path, Path]] = []
    for path in paths:
        if not path.is_dir():
            jobs.append((path, output / _safe(path.stem)))
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
            folders = file.relative_to(path).parts[:-1]
            jobs.append((file, output.joinpath(*map(_safe, folders), _safe(file.stem))))
    taken: dict[str, Path] = {}
    for path, base in jobs:
        other = taken.setdefault(str(base).casefold(), path)
        if other is not path:
            raise InputError(
                f"{other} and {path} would both be written to {base}{MASK_SUFFIX}.png. Rename one, "
                "or segment them into different folders."
            )
    return jobs


def _safe(name: str) -> str:
    """Return a file name without anything that a shell or another system trips over."""
    cleaned = re.sub(r"[^\w.()+=@ -]", "_", name).strip(" .")
    return cleaned or "_"


def _refuse_existing(jobs: Sequence[tuple[Path, Path]]) -> None:
    for _, base in jobs:
        for suffix in (f"{MASK_SUFFIX}.png", ".json"):
            target = base.with_name(base.name + suffix)
            if target.exists():
                raise InputError(
                    f"{target} exists already; nothing was written. Choose another --output, or "
                    "give --overwrite."
                )
