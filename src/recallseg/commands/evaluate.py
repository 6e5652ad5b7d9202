"""``recallseg evaluate``: segment annotated images, compare, leave a page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from recallseg.commands.common import (
    AsStoredOption,
    EngineOption,
    JsonOption,
    LegendOption,
    LibraryArgument,
    OneTimeOption,
    PlaneOption,
    PrecisionOption,
    ReachOption,
    ResampleOption,
    SegmentsOption,
    StackOption,
    StrictOption,
    ThreadsOption,
    VoiOption,
    emit_json,
    note,
    parsed,
    progress_bar,
    say_notice,
    split_list,
    split_numbers,
    tell_passed,
    tell_unlabelled,
    volume_reader,
)
from recallseg.commands.library import MissingOption, parse_missing
from recallseg.engines import defaults
from recallseg.engines.errors import InputError
from recallseg.runtime.json_text import printable
from recallseg.runtime.segmenting.reach import REACH

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from recallseg.runtime.library import Library
    from recallseg.runtime.reports.evaluation import Evaluation
    from recallseg.runtime.reports.page import Settings

__all__ = ["evaluate", "finish", "print_tables"]


def evaluate(
    library: LibraryArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="As for 'library import'.")],
    output: Annotated[Path, typer.Option(help="Folder for cases.csv, summary.json, report.html.")],
    labels: Annotated[
        Optional[str], typer.Option(help="Structures by label value, e.g. 1=liver,2=spleen.")
    ] = None,
    legend: LegendOption = None,
    mask: Annotated[
        Optional[Path],
        typer.Option(
            help="Folder of masks, or a COCO file; of one volume, its segmentation.",
            show_default="beside",
        ),
    ] = None,
    plane: PlaneOption = None,
    voi: VoiOption = False,
    time: OneTimeOption = None,
    stack: StackOption = None,
    resample: ResampleOption = False,
    segments: SegmentsOption = "union",
    as_stored: AsStoredOption = False,
    k: Annotated[str, typer.Option("--k", help="Most exemplars to recall, e.g. 1,4,16.")] = str(
        defaults.K
    ),
    reach: ReachOption = REACH,
    structures: Annotated[
        Optional[str], typer.Option(help="Which of the labelled structures.", show_default="all")
    ] = None,
    missing: MissingOption = "absent",
    spacing: Annotated[
        Optional[str],
        typer.Option(
            help="Pixel size in mm, rows,columns, of what does not say it; distances then are mm."
        ),
    ] = None,
    engine: EngineOption = defaults.ENGINE,
    precision: PrecisionOption = defaults.PRECISION,
    threads: ThreadsOption = None,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Segment images, and volumes slice by slice, whose masks are known, and compare."""
    from recallseg.runtime.formats.annotations import find_annotations
    from recallseg.runtime.formats.pairs import (
        BACKGROUND,
        parse_labels,
        parse_legend,
    )
    from recallseg.runtime.library import Library
    from recallseg.runtime.reports.evaluation import check_structures, sources_of
    from recallseg.runtime.reports.evaluation import evaluate as run
    from recallseg.runtime.reports.page import Settings
    from recallseg.runtime.segmenting.segmenter import Segmenter

    by_label = None if labels is None else parsed(parse_labels, labels, "--labels")
    by_colour = None if legend is None else parsed(parse_legend, legend, "--legend")
    ks = parsed(split_numbers, k, "--k")
    size = None if spacing is None else parsed(_spacing, spacing, "--spacing")
    unlooked = parsed(parse_missing, missing, "--missing")
    named = list(dict.fromkeys([*(by_label or {}).values(), *(by_colour or {}).values()]))
    chosen = None if structures is None else parsed(split_list, structures, "--structures")
    unlabelled = [name for name in chosen or () if named and name not in named]
    if unlabelled:
        raise typer.BadParameter(
            f"--labels or --legend has no '{unlabelled[0]}'.", param_hint="--structures"
        )
    read = volume_reader(voi, time, stack, resample, segments)
    found = find_annotations(folder, mask)
    found.check_named(by_label, by_colour)
    with Library.open(library) as opened:
        named = [name for name in named if name != BACKGROUND]
        wanted: Sequence[str] = chosen or named or opened.structures
        check_structures(opened, wanted)
        say_notice(opened.bundle.notice)

        def make(k: int) -> Segmenter:
            return Segmenter(
                opened,
                k=k,
                structures=wanted,
                reach=reach,
                engine=engine,
                precision=precision,
                threads=threads,
            )

        with progress_bar("Evaluating", len(found) * len(ks)) as step:
            evaluation = run(
                opened,
                sources_of(
                    found,
                    by_label,
                    unlooked,
                    legend=by_colour,
                    as_stored=as_stored,
                    plane=plane,
                    read=read,
                ),
                wanted,
                ks,
                make,
                spacing=size,
                progress=step,
            )
        settings = Settings.of(
            opened, f"Evaluation of {folder.resolve().name}", engine, precision, threads
        )
        left_out = {
            "unlabelled": [str(path) for path in found.unlabelled],
            "passed_over": {str(each.path): each.reason for each in found.passed},
        }
        finish(evaluation, settings, opened, output, as_json=as_json, left_out=left_out)
    tell_unlabelled(found.unlabelled)
    tell_passed(found.passed)
    if evaluation.failures or (
        strict and (found.unlabelled or found.passed or evaluation.unmentioned)
    ):
        raise typer.Exit(1)


def finish(
    evaluation: Evaluation,
    settings: Settings,
    library: Library,
    output: Path,
    *,
    as_json: bool,
    left_out: Mapping[str, Any] | None = None,
) -> None:
    """Write the files, and print what they say in short; ``left_out`` is printed with the JSON."""
    from recallseg.runtime.reports.page import render_report
    from recallseg.runtime.reports.summary import to_json, write_evaluation

    def source(key: str) -> tuple[NDArray[np.generic], Mapping[str, NDArray[np.bool_]]] | None:
        try:
            return library.source(key) if library.keeps_sources else None
        except InputError:  # removed by another process since it was recalled
            return None

    write_evaluation(evaluation, settings, render_report(evaluation, settings, source), output)
    if as_json:
        emit_json({**to_json(evaluation, settings), **(left_out or {})})
    else:
        print_tables(evaluation)
        typer.echo(f"page: {output / 'report.html'}")
    if evaluation.leaked:
        note(
            f"{len(evaluation.leaked)} images are exemplars of this library and left out of "
            f"every number: {', '.join(evaluation.leaked[:5])}"
        )
    if evaluation.unmentioned:
        note(
            f"{len(evaluation.unmentioned)} say nothing of {', '.join(evaluation.structures)} and "
            f"were left out: {', '.join(evaluation.unmentioned)}"
        )
    for name, texts in evaluation.notes.items():
        for text in texts:
            note(f"{name}: {text}")
    for name, why in evaluation.failures.items():
        note(f"failed: {name}: {why}")


def print_tables(evaluation: Evaluation) -> None:
    """Print agreement by structure and k, then latency by stage, on stdout."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from recallseg.runtime.reports.summary import latency, summarise, summarise_volumes

    console = Console()
    unit = "mm" if evaluation.in_mm else "px"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("structure", overflow="fold")
    for title in ("k", "n", "Dice", "quartiles", "worst", f"HD95 {unit}", "missed", "false+"):
        table.add_column(title, justify="right", no_wrap=True)
    for s in summarise(evaluation):
        table.add_row(
            s.structure,
            str(s.k),
            str(s.present),
            _number(s.dice["median"], 3),
            f"{_number(s.dice['q1'], 3)}-{_number(s.dice['q3'], 3)}",
            _number(s.dice["worst"], 3),
            _number(s.hd95["median"], 1),
            str(s.missed),
            f"{s.false_positives}/{s.absent}",
        )
    console.print("Agreement with the reference, medians over the images that show the structure")
    console.print(table)
    if volumes := summarise_volumes(evaluation):
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("volume", overflow="fold")
        table.add_column("structure", overflow="fold")
        for title in ("k", "slices", "Dice"):
            table.add_column(title, justify="right", no_wrap=True)
        for v in volumes:
            numbers = (str(v.k), str(v.slices), _number(v.dice, 3))
            table.add_row(printable(v.volume), v.structure, *numbers)
        console.print("Volumes as a whole, Dice of all voxels")
        console.print(table)
    by_k = latency(evaluation)
    stages = dict.fromkeys(stage for values in by_k.values() for stage in values)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    for k in by_k:
        table.add_column(f"k = {k}", justify="right", no_wrap=True)
        table.add_column("90 %", justify="right", no_wrap=True, style="dim")
    for stage in stages:
        cells = [by_k[k].get(stage, {}) for k in by_k]
        row = [f"{cell[p]:.1f}" if cell else "-" for cell in cells for p in ("p50", "p90")]
        table.add_row(stage, *row, style="bold" if stage == "total" else None)
    console.print("Latency in ms, median and 90th percentile")
    console.print(table)


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _spacing(text: str) -> tuple[float, float]:
    try:
        rows, columns = (float(part) for part in text.split(","))
    except ValueError:
        rows = columns = math.nan
    if not (0 < rows < math.inf and 0 < columns < math.inf):
        raise InputError(f"spacing must be two positive numbers like 0.7,0.7, got '{text}'.")
    return rows, columns
