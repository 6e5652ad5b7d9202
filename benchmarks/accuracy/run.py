"""The whole benchmark: datasets, measurements, and the files that it leaves."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from recallseg.benchmarks.accuracy.dataset import Dataset
from recallseg.benchmarks.accuracy.datasets import load_datasets
from recallseg.benchmarks.accuracy.measure import Case, Outcome, Plan, count_steps, measure
from recallseg.benchmarks.accuracy.page import render_page
from recallseg.benchmarks.accuracy.report import AccuracyReport
from recallseg.benchmarks.accuracy.tables import tabulate
from recallseg.benchmarks.accuracy.unet import UNetSettings
from recallseg.benchmarks.facts import bundle_facts, head
from recallseg.benchmarks.machine import Watch, describe_conditions
from recallseg.engines import defaults
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.reports.format import csv_text

__all__ = ["Accuracy", "run_accuracy"]

FOREIGN = 2
"""Images of every other dataset that are asked for a dataset's structures."""
QUICK = {"ks": (1, 8), "counts": (4, 16), "draws": 1, "most_queries": 2}
"""Of a quick run: enough to see that everything works, too few images to say anything."""

Begin = Callable[[str, int], Callable[[str], None]]


@dataclass(frozen=True)
class Accuracy:
    """What the benchmark found: every case, and the content of accuracy.json."""

    outcomes: tuple[Outcome, ...]
    report: AccuracyReport


def run_accuracy(
    output: Path,
    *,
    bundle: Bundle | str | Path = "demo",
    without_pointers: Bundle | str | Path | None = None,
    data: Path | None = None,
    datasets: Sequence[str] | None = None,
    unet: bool = True,
    unet_steps: int = 200,
    quick: bool = False,
    engine: str = defaults.ENGINE,
    precision: str = defaults.PRECISION,
    threads: int | None = None,
    begin: Begin = lambda title, steps: lambda name: None,
) -> Accuracy:
    """Measure accuracy on real images and write accuracy.json, cases.csv and accuracy.html.

    Parameters
    ----------
    output : folder; made if need be.
    bundle : what is judged: a folder or the name of a shipped bundle.
    without_pointers : a bundle of the same weights exported without object pointers; None leaves
        that question open.
    data : folder with the archives of packages that are not installed.
    datasets : names; None for all that can be had.
    unet : train the baseline (needs torch, takes minutes).
    quick : a few images and steps, to see that it works.
    begin : called with a title and a number of steps for each dataset; returns what is called after
        each step.

    Raises
    ------
    InputError
        For an unknown dataset, one that was asked for and is not here, or bundles that do not
        belong together.
    """
    opened = _open(bundle)
    other = None if without_pointers is None else _open(without_pointers)
    _check_pair(opened, other)
    found, missing = load_datasets(datasets, data)
    if not found:
        raise InputError(f"no dataset is here. {next(iter(missing.values()))}")
    training = UNetSettings(
        size=opened.geometry.image_size, steps=4 if quick else unet_steps, threads=threads
    )
    plan = Plan(
        opened,
        other,
        unet=training if unet else None,
        engine=engine,
        precision=precision,
        threads=threads,
        **(QUICK if quick else {}),  # type: ignore[arg-type]
    )
    outcomes = []
    conditions, watch = describe_conditions(), Watch()
    for dataset in found:
        foreign = _foreign(dataset, found)
        step = begin(dataset.name, count_steps(dataset, plan, len(foreign)))
        outcomes.append(measure(dataset, plan, foreign, step))
    conditions |= watch.stop()
    result = Accuracy(tuple(outcomes), _report(plan, outcomes, missing, quick, conditions))
    _write(result, output)
    return result


def _write(found: Accuracy, output: Path) -> None:
    found.report.save(output / "accuracy.json")
    _write_cases(output / "cases.csv", found.outcomes)
    (output / "accuracy.html").write_text(
        render_page(found.outcomes, found.report), encoding="utf-8"
    )


def _open(bundle: Bundle | str | Path) -> Bundle:
    return bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)


def _check_pair(bundle: Bundle, other: Bundle | None) -> None:
    if not bundle.memory.object_pointers and other is not None:
        raise InputError(
            f"the bundle '{bundle.name}' was exported without object pointers; give the one with "
            "them as the bundle."
        )
    if other is None:
        return
    if other.memory.object_pointers:
        raise InputError(
            f"the bundle '{other.name}' has object pointers. Export it with --no-object-pointers."
        )
    if (
        other.segmenter.digest != bundle.segmenter.digest
        or other.embedder.digest != bundle.embedder.digest
    ):
        raise InputError(
            f"the bundles '{bundle.name}' and '{other.name}' are of different weights: their "
            "difference would not be that of the object pointers."
        )


def _foreign(dataset: Dataset, all_of: Sequence[Dataset]) -> list[Annotated]:
    """Return images of other modalities; those of one modality may show the structure after all."""
    return [
        query
        for other in all_of
        if other.modality.split(",")[0] != dataset.modality.split(",")[0]
        for query in other.queries[:FOREIGN]
    ]


def _report(
    plan: Plan,
    outcomes: Sequence[Outcome],
    missing: Mapping[str, str],
    quick: bool,
    conditions: Mapping[str, Any],
) -> AccuracyReport:
    bundle = plan.bundle
    return AccuracyReport(
        **head(conditions),
        quick=quick,
        bundle=bundle_facts(bundle),
        without_pointers=None if plan.without_pointers is None else plan.without_pointers.identity,
        weights=f"SAM 2: {bundle.segmenter.source} {bundle.segmenter.digest}, "
        f"DINOv2: {bundle.embedder.source} {bundle.embedder.digest}",
        settings={
            "engine": plan.engine,
            "precision": plan.precision,
            "threads": plan.threads,
            "ks": list(plan.ks),
            "counts": list(plan.counts),
            "random_draws": plan.draws,
            "unet": None if plan.unet is None else asdict(plan.unet),
        },
        missing=missing,
        datasets=tuple(map(tabulate, outcomes)),
    )


def _write_cases(path: Path, outcomes: Sequence[Outcome]) -> None:
    columns = [field.name for field in fields(Case)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for outcome in outcomes:
            for case in outcome.cases:
                writer.writerow([_cell(getattr(case, column)) for column in columns])


def _cell(value: object) -> object:
    if isinstance(value, str):
        return csv_text(value)
    return f"{value:.5f}" if isinstance(value, float) else value
