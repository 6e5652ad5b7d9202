"""``recallseg bench accuracy``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from recallseg.commands.common import (
    EngineOption,
    JsonOption,
    PrecisionOption,
    ThreadsOption,
    check_output_folder,
    emit_json,
    note,
    parsed,
    progress_bar,
    say_notice,
    split_list,
)
from recallseg.engines import defaults

if TYPE_CHECKING:
    from recallseg.benchmarks.accuracy.dataset import Dataset
    from recallseg.benchmarks.accuracy.run import Accuracy

__all__ = ["accuracy", "choosing", "clicks", "head"]


DataOption = Annotated[
    Optional[Path],
    typer.Option(
        "--data", help="Folder with archives of packages that ship images ('pip download')."
    ),
]
DatasetsOption = Annotated[
    Optional[str],
    typer.Option("--datasets", help="Comma-separated names.", show_default="all that are here"),
]


def accuracy(
    output: Annotated[
        Path, typer.Option("--output", help="Folder for accuracy.json, cases.csv, accuracy.html.")
    ],
    bundle: Annotated[
        str, typer.Option("--bundle", help="Bundle to judge: a folder or name.")
    ] = "demo",
    without_pointers: Annotated[
        Optional[str],
        typer.Option(
            "--without-pointers",
            help="Bundle of the same weights exported with --no-object-pointers, to compare.",
        ),
    ] = None,
    data: DataOption = None,
    datasets: DatasetsOption = None,
    unet: Annotated[bool, typer.Option(help="Train the U-Net baseline too (needs torch).")] = True,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few images only, to see that it works.")
    ] = False,
    engine: EngineOption = defaults.ENGINE,
    precision: PrecisionOption = defaults.PRECISION,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure Dice on real images against simple baselines."""
    from recallseg.benchmarks.accuracy.run import run_accuracy

    names = None if datasets is None else parsed(split_list, datasets, "--datasets")
    check_output_folder(output)
    with ExitStack() as bars:

        def begin(title: str, steps: int) -> Callable[[str], None]:
            bars.pop_all().close()  # the bar of the dataset before
            return bars.enter_context(progress_bar(title, steps))

        found = run_accuracy(
            output,
            bundle=bundle,
            without_pointers=without_pointers,
            data=data,
            datasets=names,
            unet=unet,
            quick=quick,
            engine=engine,
            precision=precision,
            threads=threads,
            begin=begin,
        )
    for name, why in found.report.missing.items():
        note(f"left out {name}: {why}")
    say_notice(found.report.bundle.notice)
    if as_json:
        emit_json(found.report.to_json())
    else:
        _print_table(found)
        note(f"wrote {output / 'accuracy.html'}")


def _print_table(found: Accuracy) -> None:
    """Print mean Dice by structure and method on stdout."""
    from rich.console import Console
    from rich.table import Table

    from recallseg.benchmarks.accuracy.dataset import MOST_ANNOTATED
    from recallseg.benchmarks.accuracy.measure import (
        COPY_EMBEDDING,
        RANDOM,
        RECALLED,
        REFERENCE_K,
        UNET,
    )
    from recallseg.benchmarks.accuracy.tables import summarise

    columns = {
        "k = 1": (RECALLED, 1),
        "k = 8": (RECALLED, REFERENCE_K),
        "k = 16": (RECALLED, 16),
        "random": (RANDOM, REFERENCE_K),
        "copy": (COPY_EMBEDDING, 0),
        "U-Net": (UNET, 0),
    }
    table = Table(title="Mean Dice, 16 annotated images")
    table.add_column("dataset")
    table.add_column("structure")
    for title in columns:
        table.add_column(title, justify="right")
    for outcome in found.outcomes:
        dice = {
            (s.structure, s.method, s.k): s.dice
            for s in summarise(outcome)
            if s.annotated == MOST_ANNOTATED
        }
        for structure in outcome.dataset.structures:
            cells = [dice.get((structure, *key)) for key in columns.values()]
            row = ["-" if value is None else f"{value:.3f}" for value in cells]
            table.add_row(outcome.dataset.name, structure, *row)
    Console().print(table)


def choosing(
    output: Annotated[Path, typer.Option("--output", help="Folder for choosing.csv.")],
    bundle: Annotated[str, typer.Option("--bundle", help="Folder or name.")] = "demo",
    data: DataOption = None,
    datasets: DatasetsOption = None,
    draws: Annotated[int, typer.Option(min=1, help="Random choices of each budget.")] = 5,
    threads: ThreadsOption = None,
) -> None:
    """Measure whether 'library next' saves annotations, against random choices."""
    from recallseg.benchmarks.accuracy.choosing import Chosen, measure_choosing, tabulate
    from recallseg.benchmarks.accuracy.rows import write_rows
    from recallseg.engines.bundle import Bundle

    opened = Bundle.open(bundle)
    loaded, missing = _loaded(data, datasets, output)
    found = []
    for dataset in loaded:
        with progress_bar(dataset.name, 4 * (draws + 4)) as step:
            found += measure_choosing(dataset, opened, draws=draws, threads=threads, step=step)
        write_rows(output / "choosing.csv", Chosen, found)
    _print_rows("Mean Dice by annotated images", *tabulate(found), missing)
    say_notice(opened.notice)


def clicks(
    output: Annotated[Path, typer.Option("--output", help="Folder for clicks.csv and clicks.svg.")],
    bundle: Annotated[
        str, typer.Option("--bundle", help="Folder of a bundle with the graph 'correct'.")
    ] = "demo",
    data: DataOption = None,
    datasets: DatasetsOption = None,
    queries: Annotated[int, typer.Option(min=1, help="Images of each data set at most.")] = 16,
    threads: ThreadsOption = None,
) -> None:
    """Count a simulated person's clicks: without a library, with 1, 4, 16 images, with a box."""
    from recallseg.benchmarks.accuracy.annotator import (
        ANNOTATED,
        Clicked,
        measure_clicks,
        tabulate,
    )
    from recallseg.benchmarks.accuracy.click_curves import click_curves
    from recallseg.benchmarks.accuracy.rows import write_rows
    from recallseg.engines.bundle import Bundle

    opened = Bundle.open(bundle)
    loaded, missing = _loaded(data, datasets, output)
    found = []
    for dataset in loaded:
        count = len(ANNOTATED) * min(queries, len(dataset.queries))
        with progress_bar(dataset.name, count) as step:
            found += measure_clicks(
                dataset, opened, most_queries=queries, threads=threads, step=step
            )
        write_rows(output / "clicks.csv", Clicked, found)
        (output / "clicks.svg").write_text(click_curves(found), encoding="utf-8")
    _print_rows("Clicks into the middle of the largest error", *tabulate(found), missing)
    say_notice(opened.notice)


def head(
    output: Annotated[Path, typer.Option("--output", help="Folder for head.csv and head.png.")],
    bundle: Annotated[str, typer.Option("--bundle", help="Folder or name.")] = "demo",
    data: DataOption = None,
    datasets: DatasetsOption = None,
    forest: Annotated[bool, typer.Option(help="Fit a pixel forest too (scikit-learn).")] = True,
    threads: ThreadsOption = None,
) -> None:
    """Measure what 'library fit' brings with 16 annotated images, and what it had expected."""
    from recallseg.benchmarks.accuracy.heads import (
        Headed,
        measure_head,
        steps,
        tabulate,
        write_sheet,
    )
    from recallseg.benchmarks.accuracy.rows import write_rows
    from recallseg.engines.bundle import Bundle

    opened = Bundle.open(bundle)
    loaded, missing = _loaded(data, datasets, output)
    found, shown = [], []
    for i, dataset in enumerate(loaded):
        title = f"{dataset.name} ({i + 1} of {len(loaded)} data sets)"
        with progress_bar(title, steps(dataset)) as step:
            rows, pictures = measure_head(
                dataset, opened, forest=forest, threads=threads, step=step
            )
        found += rows
        shown += pictures
        for row in rows:
            note(f"{title}: {row.structure} {row.alone:.3f} alone, {row.head:.3f} with head")
        write_rows(output / "head.csv", Headed, found)
        write_sheet(output / "head.png", shown)
    _print_rows("Mean Dice, 16 annotated images", *tabulate(found), missing)
    say_notice(opened.notice)


def _loaded(
    data: Path | None, datasets: str | None, output: Path
) -> tuple[Sequence[Dataset], Mapping[str, str]]:
    """Return the data sets of the options, and why others are missing; make the output's folder."""
    from recallseg.benchmarks.accuracy.datasets import load_datasets

    names = None if datasets is None else parsed(split_list, datasets, "--datasets")
    found = load_datasets(names, data)
    check_output_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    return found


def _print_rows(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    missing: Mapping[str, str],
) -> None:
    from rich.console import Console
    from rich.table import Table

    for name, why in missing.items():
        note(f"left out {name}: {why}")
    table = Table(*header, title=title, box=None)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
