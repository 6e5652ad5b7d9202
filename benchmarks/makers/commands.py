"""``recallseg bench soak`` and ``bench capi``: in the repository, and not in the wheel."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from recallseg.benchmarks.commands import OutputOption, SideOption, finish, steps
from recallseg.benchmarks.makers.capi import capi
from recallseg.commands.common import (
    EngineOption,
    JsonOption,
    PrecisionOption,
    ThreadsOption,
    check_output_folder,
    parsed,
    say_notice,
    split_list,
    split_numbers,
)
from recallseg.engines import defaults

if TYPE_CHECKING:
    from recallseg.benchmarks.schema import Report
    from recallseg.benchmarks.subjects import RuntimeChoice

__all__ = ["capi", "soak"]


def soak(
    target: Annotated[
        str,
        typer.Argument(
            metavar="LIB|BUNDLE", help="A library, or a bundle to make one for.", show_default=False
        ),
    ],
    output: OutputOption,
    queries: Annotated[int, typer.Option(min=1, help="How many.")] = 10_000,
    minutes: Annotated[
        Optional[float],
        typer.Option(
            help="Instead: all services together among writers and readers, for so long.",
            show_default="queries alone",
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Exemplars to recall.")] = 4,
    structures: Annotated[
        Optional[str],
        typer.Option(help="Names in a library; how many for a bundle.", show_default="all, or 1"),
    ] = None,
    engine: EngineOption = defaults.ENGINE,
    precision: PrecisionOption = defaults.PRECISION,
    threads: ThreadsOption = None,
    query_size: SideOption = 512,
    as_json: JsonOption = False,
) -> None:
    """Answer many queries in one process: does memory grow, how slow is the slowest?

    With --minutes, an annotation server, a DICOM node, MRD, OpenIGTLink, a stream, queries, and
    exemplars that come and go share the process: do memory, files, threads or times grow? Exit
    status 1 if they do, but for times, or if anything fails.
    """
    from recallseg.benchmarks.makers.soak import run_soak
    from recallseg.benchmarks.subjects import RuntimeChoice
    from recallseg.benchmarks.workload import SPARE, fill_library, structure_names
    from recallseg.engines.bundle import Bundle
    from recallseg.engines.onnxruntime_cpu import usable_cores
    from recallseg.runtime.library import Library
    from recallseg.runtime.library.store import CATALOG

    used = threads or usable_cores()
    choice = RuntimeChoice(engine, precision, used)
    check_output_folder(output)
    if minutes is not None:
        _together(target, choice, minutes, output, as_json=as_json)
        return
    with TemporaryDirectory(prefix="recallseg-bench-") as scratch, steps() as step:
        if (Path(target) / CATALOG).is_file():
            library = Path(target)
            names = parsed(split_list, structures, "--structures") if structures else None
            with Library.open(library) as known:
                notice = known.bundle.notice
        else:
            opened = Bundle.open(target)
            notice = opened.notice
            counts = parsed(split_numbers, structures, "--structures") if structures else [1]
            if len(counts) != 1:
                raise typer.BadParameter("one number for a bundle", param_hint="--structures")
            library, names = Path(scratch) / "library", list(structure_names(counts[0]))
            fill_library(
                library, opened, exemplars=k + SPARE, structures=counts[0], side=query_size,
                engine=engine, precision=precision, threads=used,
                progress=lambda key: step(f"add {key}"),
            )  # fmt: skip
        say_notice(notice)
        report = run_soak(
            library, choice, k=k, structures=names, queries=queries, side=query_size, step=step
        )
    finish(report, output, _print_soak, as_json=as_json)


def _print_soak(report: Report) -> None:
    for run in report.soak:
        typer.echo(
            f"{run.queries:,} queries: memory {run.growth:+.2%} "
            f"({run.memory_start / 2**20:.1f} to {run.memory_end / 2**20:.1f} MiB), slowest "
            f"{run.slowest_over_median:.2f} times the median of {run.total.p50:.1f} ms"
        )


def _together(
    target: str, choice: RuntimeChoice, minutes: float, output: Path, *, as_json: bool
) -> None:
    from recallseg.benchmarks.makers.together import run_together
    from recallseg.engines.bundle import Bundle

    bundle = Bundle.open(target)
    say_notice(bundle.notice)
    with TemporaryDirectory(prefix="recallseg-bench-") as scratch, steps() as step:
        report = run_together(bundle, choice, minutes=minutes, folder=Path(scratch), step=step)
    finish(report, output, _print_together, as_json=as_json)
    if any(run.grew or run.errors for run in report.together):
        raise typer.Exit(1)


def _print_together(report: Report) -> None:
    for run in report.together:
        typer.echo(
            f"{run.minutes:.1f} minutes: {', '.join(f'{n} {v:,}' for n, v in run.counts.items())}"
        )
        for one in (*run.process, *run.latency):
            sign = "" if one.flat else "  NOT FLAT"
            typer.echo(f"  {one.name}: {one.early:.1f} to {one.late:.1f} {one.unit}{sign}")
        for text in run.errors:
            typer.echo(f"  failed: {text}")
