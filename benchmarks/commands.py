"""``recallseg bench``: what there is to measure on this machine, and what got slower."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from recallseg.benchmarks.accuracy.commands import accuracy, choosing, clicks, head
from recallseg.benchmarks.gpu.commands import gpu
from recallseg.benchmarks.pixels import pixels
from recallseg.benchmarks.streams import stream
from recallseg.benchmarks.volumes import volumes
from recallseg.commands.common import (
    JsonOption,
    ThreadsOption,
    check_output_folder,
    emit_json,
    note,
    parsed,
    say_notice,
    split_list,
    split_numbers,
)
from recallseg.engines import defaults
from recallseg.engines.errors import InputError

if TYPE_CHECKING:
    from recallseg.benchmarks.compare import Change
    from recallseg.benchmarks.schema import Report

__all__ = ["bench"]

bench = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Measure latency, memory and quality on this machine.",
)

QUIET_SECONDS = 5.0
"""Between lines of progress in a log."""

BundleArgument = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="Folder of a bundle, or the name of a shipped one.")
]
OutputOption = Annotated[Path, typer.Option(help="Folder for bench.json and bench.html.")]
EnginesOption = Annotated[str, typer.Option("--engine", help="What runs the networks; several.")]
PrecisionsOption = Annotated[
    str, typer.Option("--precision", help="Precision of the graphs; several.")
]
SideOption = Annotated[
    int, typer.Option("--query-size", min=16, help="Side of the queries in pixels.")
]


@bench.command()
def latency(
    bundle: BundleArgument,
    output: OutputOption,
    k: Annotated[str, typer.Option("--k", help="How many exemplars to recall.")] = "1,4,16",
    structures: Annotated[str, typer.Option(help="How many structures to ask for.")] = "1",
    engine: EnginesOption = defaults.ENGINE,
    precision: PrecisionsOption = defaults.PRECISION,
    queries: Annotated[int, typer.Option(min=1, help="Queries at every k and number.")] = 20,
    baselines: Annotated[
        Optional[str],
        typer.Option(
            help="Measured in turns: torch-cached, torch-paper, torch-compile (each also with "
            "-fp16), torch-graphs-fp16, portable.",
            show_default="none",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="For one baseline at one k; slow ones get fewer queries.")
    ] = 120.0,
    threads: ThreadsOption = None,
    query_size: SideOption = 512,
    dice: Annotated[
        Optional[str],
        typer.Option(help="Measured elsewhere, to stand beside, e.g. fp32=0.912,int8=0.909."),
    ] = None,
    sam2: Annotated[
        Optional[str],
        typer.Option(help="Checkpoint of a pretrained bundle, for PyTorch baselines."),
    ] = None,
    dinov2: Annotated[Optional[str], typer.Option(help="Likewise.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a query's latency by stage, cold start and memory, beside PyTorch in the same run."""
    from recallseg.benchmarks.latency import LatencyPlan, run_latency
    from recallseg.benchmarks.subjects import RuntimeChoice
    from recallseg.engines.bundle import Bundle
    from recallseg.engines.onnxruntime_cpu import usable_cores

    used = threads or usable_cores()
    plan = LatencyPlan(
        choices=tuple(
            RuntimeChoice(name, kind, used)
            for name in parsed(split_list, engine, "--engine")
            for kind in parsed(split_list, precision, "--precision")
        ),
        ks=tuple(parsed(split_numbers, k, "--k")),
        ns=tuple(parsed(split_numbers, structures, "--structures")),
        queries=queries,
        baselines=tuple(parsed(split_list, baselines, "--baselines")) if baselines else (),
        seconds=seconds,
        threads=used,
        side=query_size,
        dice=parsed(_split_dice, dice, "--dice") if dice else {},
        sam2=sam2,
        dinov2=dinov2,
    )
    opened = Bundle.open(bundle)
    say_notice(opened.notice)
    check_output_folder(output)
    with steps() as step:
        report = run_latency(opened, plan, step)
    finish(report, output, _print_latency, as_json=as_json)


@bench.command()
def retrieval(
    output: OutputOption,
    sizes: Annotated[str, typer.Option(help="Embeddings in the library.")] = "1e3,1e5,1e6",
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours to ask for.")] = 16,
    dimension: Annotated[int, typer.Option(min=1, help="Numbers of an embedding.")] = 384,
    queries: Annotated[int, typer.Option(min=1, help="Queries at every size.")] = 1000,
    libraries: Annotated[
        Optional[Path],
        typer.Option(
            help="Keep libraries there, 3 KB an embedding, and use those that are there.",
            show_default="made anew, temporary",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure search in large libraries: recall, latency, size, time to build and to open."""
    from recallseg.benchmarks.retrieval import run_retrieval

    counts = parsed(_split_sizes, sizes, "--sizes")
    check_output_folder(output)
    with steps() as step:
        report = run_retrieval(
            counts, k=k, dimension=dimension, queries=queries, folder=libraries, step=step
        )
    finish(report, output, _print_retrieval, as_json=as_json)


@bench.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="A bench.json or its folder.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The later one.")],
    margin: Annotated[
        float, typer.Option(min=0, help="Relative change below which nothing is named.")
    ] = 0.05,
    as_json: JsonOption = False,
) -> None:
    """Name what got slower, larger or less exact from A to B; exit status 1 if anything did."""
    from recallseg.benchmarks.compare import compare as run
    from recallseg.benchmarks.schema import Report

    found = run(Report.load(before), Report.load(after), margin=margin)
    if as_json:
        emit_json(found.to_json())
    else:
        for remark in found.remarks:
            note(f"note: {remark}")
        for gone in found.missing:
            note(f"not compared: {gone}")
        for word, changes in (("WORSE ", found.worse), ("better", found.better)):
            for change in changes:
                typer.echo(f"{word}  {_told(change)}")
        typer.echo(
            f"{len(found.worse)} worse, {len(found.better)} better, "
            f"{found.same} the same within noise"
        )
    if found.worse:
        raise typer.Exit(1)


bench.command()(accuracy)
bench.command()(choosing)
bench.command()(clicks)
bench.command()(head)
bench.command()(gpu)
bench.command()(pixels)
bench.command()(stream)
bench.command()(volumes)


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done; a line now and then where it is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        said = -QUIET_SECONDS

        def line(what: str) -> None:
            nonlocal said
            if monotonic() - said >= QUIET_SECONDS:
                console.print(what, highlight=False)
                said = monotonic()

        yield line
        return
    with console.status("begin") as status:
        yield lambda what: status.update(what)


def finish(report: Report, output: Path, show: Callable[[Report], None], *, as_json: bool) -> None:
    from recallseg.benchmarks.page import render_page

    report.save(output / "bench.json")
    (output / "bench.html").write_text(render_page(report), encoding="utf-8")
    if as_json:
        emit_json(report.to_json())
        return
    show(report)
    for remark in report.remarks:
        note(f"note: {remark}")
    note(f"written: {output / 'bench.json'}, {output / 'bench.html'}")


def _print_latency(report: Report) -> None:
    for run in report.runs:
        stages = ", ".join(
            f"{name} {spent.p50:.1f}" for name, spent in run.stages.items() if name != "total"
        )
        total = run.total
        typer.echo(
            f"{run.subject:<28} k={run.k:<3} n={run.n:<2} p50 {total.p50:9.1f} ms  p90 "
            f"{total.p90:9.1f}  p99 {total.p99:9.1f}  ({stages})"
        )
    least = {(run.subject, run.k): run for run in reversed(report.runs)}  # fewest structures
    for run in report.runs:
        one = least[run.subject, run.k]
        if run.n > one.n:
            typer.echo(
                f"{run.subject} takes {run.total.p50 / one.total.p50:.2f} times as long for "
                f"{run.n} structures as for {one.n} at k={run.k}"
            )
    for ratio in report.ratios:
        if ratio.stage == "total":
            typer.echo(
                f"{ratio.baseline} takes {ratio.ratio:.2f} times as long as {ratio.subject} at "
                f"k={ratio.k} n={ratio.n} (95 %: {ratio.low:.2f} to {ratio.high:.2f}, "
                f"{ratio.rounds} rounds)"
            )


def _print_retrieval(report: Report) -> None:
    for run in report.retrieval:
        typer.echo(
            f"{run.size:>9,} x {run.dimension}  recall@{run.k} {run.recall:.4f}  p50 "
            f"{run.search.p50:.2f} ms  p99 {run.search.p99:.2f} ms  index "
            f"{run.index_bytes / 2**20:.1f} MiB  build {run.build_s:.1f} s  open {run.open_s:.3f} s"
        )


def _told(change: Change) -> str:
    if change.unit == "ms":
        return (
            f"{change.what}: {change.figure} {change.before:.2f} -> {change.after:.2f} ms, "
            f"{change.ratio:.2f} times ({change.low:.2f} to {change.high:.2f})"
        )
    if change.unit == "bytes":
        return (
            f"{change.what}: {change.figure} {change.before / 2**20:.1f} -> "
            f"{change.after / 2**20:.1f} MiB, {change.ratio:.2f} times"
        )
    return f"{change.what}: {change.figure} {change.before:.4f} -> {change.after:.4f}"


def _split_sizes(text: str) -> list[int]:
    sizes = []
    for name in split_list(text):
        try:
            value = float(name)
        except ValueError as error:
            raise InputError(f"'{name}' is no number; expected sizes like 1e3,100000.") from error
        if not value.is_integer() or value < 1:
            raise InputError(f"a size must be a whole number from 1, got '{name}'.")
        sizes.append(int(value))
    return sizes


def _split_dice(text: str) -> dict[str, float]:
    found = {}
    for item in split_list(text):
        name, sign, value = item.partition("=")
        try:
            dice = float(value)
        except ValueError:
            dice = -1.0
        if not sign or not 0 <= dice <= 1:
            raise InputError(f"Dice must read like fp32=0.912, within 0 and 1, got '{item}'.")
        found[name.strip()] = dice
    return found


if importlib.util.find_spec("recallseg.benchmarks.makers") is not None:  # not so in a wheel
    makers = importlib.import_module("recallseg.benchmarks.makers.commands")
    bench.command()(makers.capi)
    bench.command()(makers.soak)
