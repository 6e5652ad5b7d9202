"""``recallseg bench gpu``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from recallseg.commands.common import note, parsed, split_list, split_numbers

__all__ = ["gpu"]


def gpu(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="Folders, one for each image size.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for one JSON file for each piece.")],
    engine: Annotated[str, typer.Option("--engine", help="What runs the networks; several.")] = (
        "onnxruntime-cuda,tensorrt,tensorrt-rtx"
    ),
    precision: Annotated[str, typer.Option("--precision", help="Several.")] = (
        "fp16-native,fp16,fp32,mixed,bf16"
    ),
    k: Annotated[str, typer.Option("--k", help="Exemplars to recall; several.")] = "1,4,16",
    structures: Annotated[str, typer.Option(help="How many; several.")] = "1,3",
    queries: Annotated[int, typer.Option(min=1, help="Of each combination.")] = 1000,
    baselines: Annotated[
        Optional[str], typer.Option(help="PyTorch beside it, in the same run.", show_default="none")
    ] = None,
    sam2: Annotated[
        Optional[str],
        typer.Option(
            help="Checkpoint of the pretrained bundles, for PyTorch.", show_default="none"
        ),
    ] = None,
    dinov2: Annotated[Optional[str], typer.Option(help="Likewise.", show_default="none")] = None,
    torch_device: Annotated[str, typer.Option(help="Where PyTorch runs.")] = "cuda",
    seconds: Annotated[float, typer.Option(min=0, help="For one baseline at one k.")] = 60.0,
    tests: Annotated[
        Optional[Path], typer.Option(help="The repository's tests, to run those marked gpu.")
    ] = None,
    most_seconds: Annotated[
        float, typer.Option(min=1, help="For the queries of one combination; then fewer are asked.")
    ] = 120.0,
    minutes: Annotated[
        float, typer.Option(min=0, help="End after so many; call again to go on.")
    ] = 10.0,
) -> None:
    """Measure everything on a GPU, in pieces that a later call takes up where this one ended.

    Each piece is a process with a time limit of its own: one that crashes or hangs is told, and the
    next goes on. The most important come first.
    """
    from recallseg.benchmarks.commands import steps
    from recallseg.benchmarks.gpu.apart import in_a_process
    from recallseg.benchmarks.gpu.goals import GOALS_SCHEMA, judge
    from recallseg.benchmarks.gpu.pieces import GpuPlan, pieces_of
    from recallseg.benchmarks.gpu.running import run_pieces

    plan = GpuPlan(
        bundles=tuple(bundles),
        engines=tuple(parsed(split_list, engine, "--engine")),
        precisions=tuple(parsed(split_list, precision, "--precision")),
        ks=tuple(parsed(split_numbers, k, "--k")),
        ns=tuple(parsed(split_numbers, structures, "--structures")),
        queries=queries,
        most_seconds=most_seconds,
        baselines=tuple(parsed(split_list, baselines, "--baselines")) if baselines else (),
        sam2=sam2,
        dinov2=dinov2,
        torch_device=torch_device,
        seconds=seconds,
        tests=tests,
    )
    pieces = list(pieces_of(plan))
    with steps() as step:
        outcomes = run_pieces(pieces, output, minutes=minutes, step=step, run=in_a_process(plan))
    for outcome in outcomes:
        typer.echo(f"{outcome.state:<9} {outcome.piece}" + f"  {outcome.reason}".rstrip())
    goals = judge(outcomes)
    for goal in goals:
        typer.echo(str(goal))
    (output / "goals.json").write_text(
        json.dumps({"schema": GOALS_SCHEMA, "goals": [asdict(goal) for goal in goals]}, indent=1)
        + "\n",
        encoding="utf-8",
    )
    left = len(pieces) - len(outcomes)
    if left:
        note(f"{left} of {len(pieces)} pieces are left: call again to go on")
    if any(outcome.state == "failed" for outcome in outcomes):
        raise typer.Exit(1)
