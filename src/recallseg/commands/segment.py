"""``recallseg segment``: images and volumes in, segmentations and their records out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from recallseg.commands.common import (
    AuditOption,
    CleanUpOption,
    EngineOption,
    JsonOption,
    LibraryArgument,
    PlaneOption,
    PrecisionOption,
    PreviewOption,
    PropagateOption,
    ReachOption,
    ThreadsOption,
    VoiOption,
    emit_json,
    note,
    parsed,
    progress_bar,
    say_notice,
    split_clean_ups,
    split_list,
)
from recallseg.engines.errors import InputError
from recallseg.runtime.segmenting.reach import REACH

if TYPE_CHECKING:
    from recallseg.runtime.segmenting.segmenter import Segmenter
    from recallseg.runtime.services.audit import AuditLog
    from recallseg.runtime.volumes.outputs import VolumeSettings

__all__ = ["segment"]


@dataclass(frozen=True)
class _Job:
    """An image or a volume, and the path, less its suffix, that its outputs get."""

    path: Path
    base: Path
    kind: str  # as volume_format() says; "image" is a plain one


def segment(
    library: LibraryArgument,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Images, NIfTI, NRRD or DICOM files, DICOM series, or folders of images.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for NAME.mask.png and NAME.json.")],
    k: Annotated[int, typer.Option("--k", min=1, help="Exemplars to recall.")] = 4,
    reach: ReachOption = REACH,
    structures: Annotated[
        Optional[str], typer.Option(help="Which, in the order of label values.", show_default="all")
    ] = None,
    engine: EngineOption = "onnxruntime-cpu",
    precision: PrecisionOption = "fp32",
    threads: ThreadsOption = None,
    kind: Annotated[
        Optional[str],
        typer.Option("--format", help="dicom, nifti, nrrd or image, where a name does not tell."),
    ] = None,
    plane: PlaneOption = None,
    propagate: PropagateOption = 0,
    clean_up: CleanUpOption = None,
    preview: PreviewOption = False,
    voi: VoiOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    audit: AuditOption = None,
    as_json: JsonOption = False,
) -> None:
    """Segment images, and volumes slice by slice, by recalling the library's exemplars."""
    from recallseg.runtime.library import Library
    from recallseg.runtime.segmenting.segmenter import Segmenter
    from recallseg.runtime.services.audit import AuditLog
    from recallseg.runtime.volumes.outputs import VolumeSettings

    names = None if structures is None else parsed(split_list, structures, "--structures")
    wanted = () if clean_up is None else parsed(split_clean_ups, clean_up, "--clean-up")
    settings = VolumeSettings(plane, "largest" in wanted, "holes" in wanted, preview, voi)
    jobs = _jobs(paths, output, kind)
    if not overwrite:
        _refuse_existing(jobs)
    log = None if audit is None else AuditLog(audit)
    records: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    with Library.open(library) as opened:
        segmenter = Segmenter(
            opened,
            k=k,
            structures=names,
            reach=reach,
            engine=engine,
            precision=precision,
            threads=threads,
            memories=propagate,
        )
        say_notice(segmenter.bundle.notice)
        with progress_bar("Segmenting", len(jobs)) as step:
            for job in jobs:
                try:
                    if job.kind == "image":
                        record, line = _segment_image(segmenter, job, log)
                    else:
                        record, line = _segment_volume(segmenter, job, settings, log)
                except InputError as error:
                    failed[str(job.path)] = str(error)
                else:
                    records.append(record)
                    if not as_json:
                        typer.echo(line)
                step(job.path.name)
    if as_json:
        emit_json({"results": records, "failed": failed})
    for path_text, why in failed.items():
        note(f"failed: {path_text}: {why}")
    if failed:
        raise typer.Exit(1)


def _segment_image(
    segmenter: Segmenter, job: _Job, log: AuditLog | None
) -> tuple[dict[str, Any], str]:
    from recallseg.runtime.formats.images import read_image
    from recallseg.runtime.services.outputs import mask_file, write_result

    image = read_image(job.path)
    result = segmenter.segment(image)
    if log is not None:
        log.record(image, result.label_map, result.to_json())
    return write_result(job.base, result, job.path.name), f"{mask_file(job.base)}  {result!r}"


def _segment_volume(
    segmenter: Segmenter, job: _Job, settings: VolumeSettings, log: AuditLog | None
) -> tuple[dict[str, Any], str]:
    from recallseg.runtime.formats.reading import read_volume
    from recallseg.runtime.formats.volume import Slicing
    from recallseg.runtime.volumes.outputs import segment_to_files

    volume = read_volume(job.path, kind=job.kind, voi=settings.voi)
    slices = Slicing.of(volume, settings.plane).count(volume)
    with progress_bar(job.path.name, slices) as step:
        result, record = segment_to_files(
            segmenter,
            volume,
            job.base,
            settings,
            kind=job.kind,
            source=job.path.name,
            log=log,
            progress=step,
        )
    target = record["mask"] or "nothing found"
    return record, f"{job.base.parent / target}  {result!r}"


def _jobs(paths: Sequence[Path], output: Path, kind: str | None) -> list[_Job]:
    """Return what to segment.

    Raises
    ------
    InputError
        If a path is not there, a folder has no image, or two outputs would have the same name.
    """
    from recallseg.runtime.formats.reading import volume_format, volume_stem
    from recallseg.runtime.services.inbox import kind_in_folder
    from recallseg.runtime.services.outputs import output_base

    def job(path: Path, relative: Path, found: str | None) -> _Job:
        stem = relative.with_name(f"{volume_stem(path)}.x")  # the suffix goes, dots before it stay
        return _Job(path, output_base(output, stem), found or "image")

    jobs: list[_Job] = []
    for path in paths:
        found = kind or (volume_format(path) if path.exists() else None)
        if found is not None or not path.is_dir():
            jobs.append(job(path, Path(path.name), found))
            continue
        inside = [(file, kind_in_folder(file, path)) for file in sorted(path.rglob("*"))]
        files = [(file, inner) for file, inner in inside if inner is not None]
        if not files:
            raise InputError(
                f"there is no image in {path} (label maps NAME.mask.png do not count)."
            )
        jobs += [job(file, file.relative_to(path), inner) for file, inner in files]
    taken: dict[str, Path] = {}
    for each in jobs:
        other = taken.setdefault(str(each.base).casefold(), each.path)
        if other is not each.path:
            raise InputError(
                f"{other} and {each.path} would both be written to {each.base}. Rename one, or "
                "segment them into different folders."
            )
    return jobs


def _refuse_existing(jobs: Sequence[_Job]) -> None:
    from recallseg.runtime.services.outputs import mask_file, record_file, volume_files

    for job in jobs:
        plain = [mask_file(job.base), record_file(job.base)]
        for target in plain if job.kind == "image" else volume_files(job.base):
            if target.exists():
                raise InputError(
                    f"{target} exists already; nothing was written. Choose another --output, or "
                    "give --overwrite."
                )
