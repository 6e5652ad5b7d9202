"""``recallseg watch``: segment whatever arrives in a folder."""

from __future__ import annotations

import signal
from pathlib import Path
from threading import Event
from typing import Annotated, Optional

import typer

from recallseg.commands.common import (
    AsStoredOption,
    AuditHeadOption,
    AuditKeyOption,
    AuditOption,
    CleanUpOption,
    EngineOption,
    JsonOption,
    PlaneOption,
    PrecisionOption,
    PreviewOption,
    PropagateOption,
    ReachOption,
    ThreadsOption,
    VoiOption,
    note,
    open_audit,
    parsed,
    say_notice,
    split_clean_ups,
    split_list,
    tell_passed,
)
from recallseg.commands.library import TagOption, parse_tags
from recallseg.runtime.json_text import json_text, printable
from recallseg.runtime.segmenting.reach import REACH

__all__ = ["watch"]


def watch(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Folder in which images arrive.")],
    library: Annotated[Path, typer.Option(help="Folder of the library.")],
    output: Annotated[Path, typer.Option(help="Folder for segmentations and their NAME.json.")],
    k: Annotated[int, typer.Option("--k", min=1, help="Most exemplars to recall.")] = 4,
    reach: ReachOption = REACH,
    structures: Annotated[
        Optional[str], typer.Option(help="Which, in the order of label values.", show_default="all")
    ] = None,
    tag: TagOption = None,
    engine: EngineOption = "onnxruntime-cpu",
    precision: PrecisionOption = "fp32",
    threads: ThreadsOption = None,
    settle: Annotated[
        float,
        typer.Option(min=0, help="Seconds without a change until a file or series is complete."),
    ] = 2.0,
    plane: PlaneOption = None,
    propagate: PropagateOption = 0,
    clean_up: CleanUpOption = None,
    preview: PreviewOption = False,
    voi: VoiOption = False,
    as_stored: AsStoredOption = False,
    once: Annotated[
        bool, typer.Option("--once", help="End when all that is there is done.")
    ] = False,
    audit: AuditOption = None,
    audit_key: AuditKeyOption = None,
    audit_head: AuditHeadOption = None,
    as_json: JsonOption = False,
) -> None:
    """Segment every image, volume and DICOM series that arrives in a folder, once.

    Stop it with Ctrl-C or SIGTERM; after a restart it goes on where it was. Exit status 1 if
    something could not be segmented.
    """
    from recallseg.runtime.library import Library
    from recallseg.runtime.segmenting.segmenter import Segmenter
    from recallseg.runtime.services.watching import Watcher
    from recallseg.runtime.volumes.outputs import VolumeSettings

    names = None if structures is None else parsed(split_list, structures, "--structures")
    tags = parse_tags(tag)
    wanted = () if clean_up is None else parsed(split_clean_ups, clean_up, "--clean-up")
    volumes = VolumeSettings(
        plane, "largest" in wanted, "holes" in wanted, preview, voi, as_stored=as_stored
    )
    stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    failed, told = False, set[str]()
    with Library.open(library) as opened:
        segmenter = Segmenter(
            opened,
            k=k,
            structures=names,
            tags=tags,
            reach=reach,
            engine=engine,
            precision=precision,
            threads=threads,
            frames=propagate,
        )
        log = open_audit(audit, audit_key, audit_head)
        with Watcher(
            segmenter, source, output, settle_s=settle, volumes=volumes, audit=log
        ) as watcher:
            say_notice(segmenter.bundle.notice)
            segmenter.warm_up()
            if not as_json:
                note(f"watching {source}")
            for arrival in watcher.run(stop, once=once):
                failed |= arrival.record is None
                mend = arrival.record["quality"]["mend"] if arrival.record else ""
                if mend and mend not in told:
                    told.add(mend)
                    note(f"uncalibrated: {mend}")
                if as_json:
                    answer = arrival.record or {"image": arrival.name, "error": arrival.error}
                    typer.echo(json_text(answer, indent=None))
                elif arrival.record is None:
                    note(f"failed: {arrival.error}")
                else:
                    total = arrival.record["timings_ms"]["total"]
                    quality = arrival.record["quality"]
                    flag = quality.get("flag") or f"slices {quality['flags']}"
                    typer.echo(printable(f"{arrival.name}  {flag}, {total:.0f} ms"))
            if not as_json:
                tell_passed(watcher.passed)
    if failed:
        raise typer.Exit(1)
