"""``recallseg reproduce``: the paper's experiment on a user's data and weights."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from recallseg.commands.common import (
    EngineOption,
    JsonOption,
    PrecisionOption,
    ThreadsOption,
    emit_json,
    note,
    parsed,
    progress_bar,
    say_notice,
    split_numbers,
)
from recallseg.engines import defaults

if TYPE_CHECKING:
    from recallseg.runtime.reports.paper import Reproduction

__all__ = ["reproduce"]


def reproduce(
    data: Annotated[Path, typer.Option(help="Folder with ACDC, CHAOS (MR) or both, unpacked.")],
    bundle: Annotated[str, typer.Option(help="Folder of a bundle, or the name of a shipped one.")],
    as_the_paper: Annotated[
        bool, typer.Option("--as-the-paper", help="Turn off everything that can be turned off.")
    ] = False,
    exact_memories: Annotated[
        bool, typer.Option("--exact-memories", help="Memories in float32, kept in main memory.")
    ] = False,
    every_distance: Annotated[
        bool, typer.Option("--every-distance", help="Recall k exemplars however far they are.")
    ] = False,
    no_presence: Annotated[
        bool, typer.Option("--no-presence", help="Look for every structure in every slice.")
    ] = False,
    whole_range: Annotated[
        bool, typer.Option("--whole-range", help="Smallest to largest value become 0 to 1.")
    ] = False,
    queries: Annotated[int, typer.Option(min=1, help="Slices to segment.")] = 50,
    budgets: Annotated[
        str, typer.Option(help="Numbers of annotated slices, beside all.")
    ] = "8,16,32,64",
    draws: Annotated[int, typer.Option(min=1, help="Random choices of each budget.")] = 3,
    engine: EngineOption = defaults.ENGINE,
    precision: PrecisionOption = defaults.PRECISION,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Repeat the paper's experiment (arXiv 2408.08813) on ACDC and CHAOS, beside its numbers."""
    from recallseg.engines.bundle import Bundle
    from recallseg.runtime.reports.challenges import find_challenge
    from recallseg.runtime.reports.paper import Protocol
    from recallseg.runtime.reports.paper import reproduce as run

    counts = parsed(split_numbers, budgets, "--budgets")
    chosen = (
        Protocol.as_the_paper()
        if as_the_paper
        else Protocol(exact_memories, every_distance, no_presence, whole_range)
    )
    opened = Bundle.open(bundle)
    found = []
    for challenge in find_challenge(data):
        with (
            TemporaryDirectory(prefix="recallseg-reproduce-") as folder,
            progress_bar(challenge.name, queries) as step,
        ):
            one = run(
                challenge,
                opened,
                Path(folder) / "library",
                protocol=chosen,
                queries=queries,
                budgets=counts,
                draws=draws,
                engine=engine,
                precision=precision,
                threads=threads,
                progress=step,
            )
        found.append(one)
        if not as_json:
            _print(one)
    if as_json:
        emit_json([one.to_json() for one in found])
    say_notice(opened.notice)


def _print(found: Reproduction) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from recallseg.runtime.reports.paired import budgets
    from recallseg.runtime.reports.paper import KS, PAPER_DICE, PAPER_MS

    console = Console(markup=False)
    exemplars, queries = found.patients
    console.print(
        f"{found.challenge}: {found.queries} slices of {queries} patients, recalled from "
        f"{found.exemplars} slices of {exemplars} others"
    )
    table = Table(box=SIMPLE_HEAD, title="Mean Dice, ours and the paper's", title_justify="left")
    table.add_column("structure")
    table.add_column("")
    ks = [k for k in found.evaluation.ks if k in KS]
    for k in ks:
        table.add_column(f"k = {k}", justify="right")
    for name in found.structures:
        table.add_row(name, "ours", *(_number(found.dice(name, k), 3) for k in ks))
        paper = PAPER_DICE.get((found.challenge, name), {})
        table.add_row("", "paper", *(_number(paper.get(k, math.nan), 2) for k in ks))
    console.print(table)
    table = Table(box=SIMPLE_HEAD, title="ms an image, ours on this machine", title_justify="left")
    table.add_column("")
    for k in PAPER_MS:
        table.add_column(f"k = {k}", justify="right")
    table.add_row("ours", *(_number(found.milliseconds(k), 0) for k in PAPER_MS))
    table.add_row("paper", *map(str, PAPER_MS.values()))
    console.print(table)
    rows = budgets(found.evaluation)
    if rows:
        table = Table(
            box=SIMPLE_HEAD,
            title="Mean Dice by annotated slices, at the largest k",
            title_justify="left",
        )
        for head in ("structure", "annotated", "draws", "Dice", "deviation"):
            table.add_column(head)
        for row in rows:
            numbers = (f"{row.mean:.3f}", f"{row.deviation:.3f}")
            table.add_row(row.structure, str(row.annotated), str(row.draws), *numbers)
        console.print(table)
    table = Table("not as in the paper", "here", "turned off by", box=SIMPLE_HEAD)
    for one in found.deviations:
        table.add_row(one.what, "yes" if one.active else "no", one.switch)
    console.print(table)
    for text in found.notes:
        note(f"{found.challenge}: {text}")
    for name, why in found.evaluation.failures.items():
        note(f"failed: {name}: {why}")


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
