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
    check_output_folder,
    emit_json,
    note,
    one_of,
    parsed,
    progress_bar,
    say,
    say_notice,
    split_list,
    split_numbers,
    tell_passed,
    tell_unlabelled,
)
from recallseg.commands.library import MissingOption, parse_missing
from recallseg.engines import defaults
from recallseg.engines.errors import InputError
from recallseg.runtime.json_text import printable
from recallseg.runtime.segmenting.reach import REACH

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from recallseg.runtime.reports.cases import Evaluation

__all__ = ["evaluate", "finish", "print_tables"]


def evaluate(
    library: LibraryArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="As for 'library import'.")],
    output: Annotated[Path, typer.Option(help="Folder for cases.csv, summary.json, report.html.")],
    budgets: Annotated[
        Optional[str],
        typer.Option(help="Numbers of annotated images to recall from, e.g. 1,2,4, beside all."),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Random choices of each budget.")] = 3,
    baselines: Annotated[
        Optional[str],
        typer.Option(help="copy, forest (extra 'fit'), match: on the same images and split."),
    ] = None,
    split_by: Annotated[
        Optional[str],
        typer.Option(
            metavar="GROUP",
            help="Make LIB of FOLDER, and recall nothing of a query's own group: patient, folder, "
            "file or name:REGEX.",
        ),
    ] = None,
    folds: Annotated[
        Optional[int],
        typer.Option(min=2, help="With --split-by, deal groups to so many parts, leave one out."),
    ] = None,
    group_by: Annotated[
        Optional[str],
        typer.Option(metavar="GROUP", help="What counts as one patient.", show_default="file"),
    ] = None,
    bundle: Annotated[
        Optional[str],
        typer.Option(
            help="What LIB belongs to, and a new one (--split-by) shall.",
            show_default="LIB's, or demo",
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Of surface Dice, in mm (pixels where not known).")
    ] = 2.0,
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
    refine: Annotated[
        bool,
        typer.Option(
            "--refine/--no-refine", help="Let the library's head, if it has one, take part."
        ),
    ] = True,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Segment images, and volumes slice by slice, whose masks are known, and compare."""
    from recallseg.runtime.formats.annotated_volumes import volume_reader
    from recallseg.runtime.formats.annotations import find_annotations
    from recallseg.runtime.formats.pairs import (
        BACKGROUND,
        parse_labels,
        parse_legend,
    )
    from recallseg.runtime.library import Library
    from recallseg.runtime.reports.annotated_sources import GroupRule, sources_of
    from recallseg.runtime.reports.baselines import BASELINES
    from recallseg.runtime.reports.evaluation import check_structures
    from recallseg.runtime.reports.evaluation import evaluate as run
    from recallseg.runtime.reports.splitting import fill_pool
    from recallseg.runtime.segmenting.segmenter import Segmenter

    by_label = None if labels is None else parsed(parse_labels, labels, "--labels")
    by_colour = None if legend is None else parsed(parse_legend, legend, "--legend")
    ks = parsed(split_numbers, k, "--k")
    size = None if spacing is None else parsed(_spacing, spacing, "--spacing")
    counts = () if budgets is None else parsed(split_numbers, budgets, "--budgets")
    others = () if baselines is None else parsed(split_list, baselines, "--baselines")
    for one in others:
        one_of(one, BASELINES, "baseline")
    unlooked = parsed(parse_missing, missing, "--missing")
    named = list(dict.fromkeys([*(by_label or {}).values(), *(by_colour or {}).values()]))
    chosen = None if structures is None else parsed(split_list, structures, "--structures")
    unlabelled = [name for name in chosen or () if named and name not in named]
    if unlabelled:
        raise typer.BadParameter(
            f"--labels or --legend has no '{unlabelled[0]}'.", param_hint="--structures"
        )
    if (split_by is None and folds is not None) or (split_by is not None and group_by is not None):
        raise typer.BadParameter("--folds goes with --split-by, --group-by without it.")
    rule = split_by or group_by
    group = None if rule is None else parsed(GroupRule.parse, rule, "--split-by, --group-by")
    read = volume_reader(voi, time, stack, resample, segments)
    found = find_annotations(folder, mask)
    named = [name for name in named if name != BACKGROUND]
    sources = sources_of(
        found,
        by_label,
        unlooked,
        legend=by_colour,
        as_stored=as_stored,
        plane=plane,
        read=read,
        group=group,
    )
    if split_by is None or library.exists():
        opened = Library.open(
            library,
            bundle,
            mode="read" if split_by is None else "write",
            engine=engine,
            precision=precision,
            threads=threads,
        )
    else:
        opened = Library.create(
            library, bundle or "demo", engine=engine, precision=precision, threads=threads
        )
    with opened:
        groups = None
        if split_by is not None:
            say_notice(opened.bundle.notice)
            with progress_bar("Annotating", len(sources)) as step:
                groups = fill_pool(opened, sources, chosen or named, step)
        wanted: Sequence[str] = chosen or named or opened.structures
        check_structures(opened, wanted)
        check_output_folder(output)
        if split_by is None:
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
                refine=refine,
            )

        with progress_bar("Evaluating", len(found)) as step:
            evaluation = run(
                opened,
                sources,
                wanted,
                ks,
                make,
                spacing=size,
                tolerance=tolerance,
                budgets=counts,
                draws=draws,
                baselines=others,
                groups=groups,
                folds=folds,
                threads=threads,
                progress=step,
            )
        left_out = {
            "unlabelled": [str(path) for path in found.unlabelled],
            "passed_over": {str(each.path): each.reason for each in found.passed},
        }
        title = f"Evaluation of {folder.resolve().name}"
        written = evaluation.write(output, opened, title=title, threads=threads)
        finish(evaluation, {**written, **left_out}, output, as_json=as_json)
    tell_unlabelled(found.unlabelled)
    tell_passed(found.passed)
    if evaluation.failures or (
        strict and (found.unlabelled or found.passed or evaluation.unmentioned)
    ):
        raise typer.Exit(1)


def finish(
    evaluation: Evaluation, answer: Mapping[str, Any], output: Path, *, as_json: bool
) -> None:
    """Print what was written in short, or ``answer`` as JSON."""
    if as_json:
        emit_json(answer)
    else:
        print_tables(evaluation)
        say(f"page: {output / 'report.html'}")
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

    from recallseg.runtime.reports.paired import budgets, by_group, differences
    from recallseg.runtime.reports.summary import latency, summarise

    console = Console(markup=False)
    unit = "mm" if evaluation.in_mm else "px"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("structure", overflow="fold")
    for title in (
        "method",
        "k",
        "n",
        "Dice",
        "quartiles",
        "worst",
        f"HD95 {unit}",
        "missed",
        "false+",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for s in summarise(evaluation):
        table.add_row(
            s.structure,
            s.method,
            str(s.k or "-"),
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
    ways = {arm: f"{arm.method} {arm.k or ''}".strip() for arm in evaluation.arms}
    whole = [
        (printable(v.volume), v.structure, ways[v.arm], str(v.slices), _number(v.dice, 3),
         _number(v.hd95, 1), _number(v.surface_dice, 3), _number(100 * v.volume_difference, 0))
        for v in evaluation.volumes
        if not v.annotated
    ]  # fmt: skip
    _print(
        console,
        "Volumes as a whole, all voxels",
        ("volume", "structure", "method", "slices", "Dice", f"HD95 {unit}", "surface Dice", "+- %"),
        whole,
    )
    _print(
        console,
        f"By {evaluation.unit}: mean Dice and its 95 % interval",
        ("structure", "of", "method", f"{evaluation.unit}s", "Dice", "from", "to", "worst"),
        [
            (g.structure, "volumes" if g.three_d else "images", ways[g.arm], str(g.groups),
             *(_number(x, 3) for x in (g.mean, g.low, g.high, g.worst)))
            for g in by_group(evaluation)
        ],
    )  # fmt: skip
    _print(
        console,
        "Paired differences in Dice on the same images, 95 % interval",
        ("structure", "method", "less", f"{evaluation.unit}s", "difference", "from", "to"),
        [
            (d.structure, ways[d.arm], ways[d.other], str(d.groups),
             *(_number(x, 3) for x in (d.mean, d.low, d.high)))
            for d in differences(evaluation)
        ],
    )  # fmt: skip
    _print(
        console,
        "By number of annotated images",
        ("structure", "method", "annotated", "draws", "Dice", "deviation"),
        [
            (b.structure, b.method, str(b.annotated), str(b.draws), _number(b.mean, 3),
             _number(b.deviation, 3))
            for b in budgets(evaluation)
        ],
    )  # fmt: skip
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


def _print(
    console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print a table, texts to the left and numbers to the right; nothing without rows."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    if not rows:
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, head in enumerate(heads):
        if place < 3:
            table.add_column(head, overflow="fold")
        else:
            table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(title)
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
