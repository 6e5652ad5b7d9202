"""``bench volumes``: a volume slice by slice, and with memories of the slices beside (propagation).

A few slices of a real volume are annotated; all slices are segmented, and those that were not
annotated are judged: Dice of the whole and per slice, how evenly masks go on from slice to slice,
what is found where the reference has nothing, and time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar, Optional

import numpy as np
import typer
from numpy.typing import NDArray

from recallseg.benchmarks.facts import bundle_facts, head
from recallseg.benchmarks.machine import Watch, describe_conditions
from recallseg.benchmarks.schema import BundleFacts, Head
from recallseg.benchmarks.volume_cases import VolumeCase, load_cases
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
    split_numbers,
)
from recallseg.engines import defaults
from recallseg.engines.bundle import Bundle
from recallseg.engines.verification import mask_dice
from recallseg.runtime.formats.volume import Slicing
from recallseg.runtime.library import Library
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.volumes.outputs import write_preview
from recallseg.runtime.volumes.slices import VolumeResult, segment_volume

__all__ = ["Outcome", "VolumeFacts", "VolumesReport", "judge", "volumes"]


@dataclass(frozen=True)
class Outcome:
    """One structure of one volume, segmented one way; only slices that were not annotated count.

    Attributes
    ----------
    k : most exemplars recalled.
    memories : of other slices that a slice could use; 0: slice by slice.
    dice : of all voxels of these slices at once.
    slice_dice, least_slice_dice : mean and least over the slices that show the structure.
    unevenness : mean difference between result and reference in the Dice of two neighbouring
        slices, annotated ones too; 0 where masks go on from slice to slice as the reference does.
    empty_slices, false_slices : slices that do not show it, and those of them where it was found.
    false_voxels : found in these slices, beside the structure's voxels in the whole volume.
    seconds, slices : of the whole volume with all structures.
    """

    volume: str
    structure: str
    k: int
    memories: int
    dice: float
    slice_dice: float
    least_slice_dice: float
    unevenness: float
    empty_slices: int
    false_slices: int
    false_voxels: float
    seconds: float
    slices: int


@dataclass(frozen=True)
class VolumeFacts:
    """A volume; ``shape`` (slices, rows, columns), ``annotated`` numbers of slices."""

    name: str
    modality: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    structures: tuple[str, ...]
    annotated: tuple[int, ...]
    licence: str
    source: str

    @classmethod
    def of(cls, case: VolumeCase) -> VolumeFacts:
        """Return what a report says of a volume."""
        volume = case.volume
        return cls(
            case.name, case.modality, volume.shape, volume.spacing, tuple(case.masks),
            tuple(map(int, case.annotated)), case.licence, case.source,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VolumesReport(Head):
    """``bench volumes``.

    Attributes
    ----------
    settings : the options.
    missing : why volumes were left out, by name.
    """

    schema: ClassVar[str] = "recallseg-bench-volumes/1"

    bundle: BundleFacts
    settings: Mapping[str, Any]
    volumes: tuple[VolumeFacts, ...]
    missing: Mapping[str, str]
    outcomes: tuple[Outcome, ...]


def judge(case: VolumeCase, result: VolumeResult) -> list[Outcome]:
    """Compare a result with the reference masks of its volume."""
    judged = []
    for name, value in result.labels.items():
        truth = [result.slicing.view(case.masks[name], i) for i in range(len(result.slices))]
        found = [result.slicing.view(result.label_map == value, i) for i in range(len(truth))]
        kept = [i for i in range(len(truth)) if i not in case.annotated]
        shown = [i for i in kept if truth[i].any()]
        empty = [i for i in kept if not truth[i].any()]
        by_slice = [mask_dice(found[i], truth[i]) for i in shown]
        pairs = [(i, i + 1) for i in range(len(truth) - 1) if truth[i].any() or truth[i + 1].any()]
        uneven = [abs(mask_dice(found[a], found[b]) - mask_dice(truth[a], truth[b]))
                  for a, b in pairs]  # fmt: skip
        judged.append(
            Outcome(
                case.name,
                name,
                result.provenance.recipe.k,
                result.propagated,
                round(_pooled_dice([found[i] for i in kept], [truth[i] for i in kept]), 4),
                round(float(np.mean(by_slice)), 4),
                round(float(np.min(by_slice)), 4),
                round(float(np.mean(uneven)), 4),
                len(empty),
                sum(bool(found[i].any()) for i in empty),
                round(sum(int(found[i].sum()) for i in empty) / int(case.masks[name].sum()), 5),
                round(result.milliseconds / 1e3, 3),
                len(result.slices),
            )
        )
    return judged


def volumes(
    output: Annotated[Path, typer.Option(help="Folder for volumes.json and pictures.")],
    bundle: Annotated[str, typer.Option(help="Bundle to judge: a folder or name.")] = "demo",
    data: Annotated[
        Optional[Path],
        typer.Option(help="Folder with archives of packages that ship images ('pip download')."),
    ] = None,
    names: Annotated[
        Optional[str],
        typer.Option("--volumes", help="Comma-separated.", show_default="all that are here"),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Exemplars to recall.")] = 4,
    memories: Annotated[str, typer.Option(help="Numbers of memories beside 0.")] = "1,3",
    engine: EngineOption = defaults.ENGINE,
    precision: PrecisionOption = defaults.PRECISION,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure propagation against slice by slice on real volumes."""
    rings = [0, *parsed(split_numbers, memories, "--memories")]
    cases, missing = load_cases(
        None if names is None else parsed(split_list, names, "--volumes"), data
    )
    for name, why in missing.items():
        note(f"left out {name}: {why}")
    opened = Bundle.open(bundle)
    say_notice(opened.notice)
    check_output_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    conditions, watch = describe_conditions(), Watch()
    for case in cases:
        outcomes += _measure(case, opened, output, rings, k, (engine, precision, threads))
    conditions |= watch.stop()
    report = VolumesReport(
        **head(conditions),
        bundle=bundle_facts(opened),
        settings={"k": k, "engine": engine, "precision": precision, "threads": threads},
        volumes=tuple(map(VolumeFacts.of, cases)),
        missing=missing,
        outcomes=tuple(outcomes),
    )
    report.save(output / "volumes.json")
    if as_json:
        emit_json(report.to_json())
        return
    _print_table(outcomes)
    for remark in report.remarks:
        note(remark)
    note(f"wrote {output / 'volumes.json'}")


def _measure(
    case: VolumeCase,
    bundle: Bundle,
    output: Path,
    rings: Sequence[int],
    k: int,
    runs_on: tuple[str, str, int | None],
) -> list[Outcome]:
    engine, precision, threads = runs_on
    outcomes = []
    count = Slicing.of(case.volume).count(case.volume)
    with (
        TemporaryDirectory(prefix="recallseg-bench-") as folder,
        progress_bar(case.name, len(case.annotated) + len(rings) * count) as step,
    ):
        _fill(case, bundle, Path(folder, "library"), runs_on, step)
        for ring in rings:
            with Library.open(Path(folder, "library")) as library:
                segmenter = Segmenter(
                    library,
                    k=k,
                    structures=list(case.masks),
                    engine=engine,
                    precision=precision,
                    threads=threads,
                    frames=ring,
                )
                segmenter.warm_up()
                result = segment_volume(segmenter, case.volume, progress=step)
                write_preview(output / f"{case.name}-memories-{ring}", case.volume, result, library)
            outcomes += judge(case, result)
    return outcomes


def _fill(
    case: VolumeCase,
    bundle: Bundle,
    path: Path,
    runs_on: tuple[str, str, int | None],
    step: Callable[[str], None],
) -> None:
    engine, precision, threads = runs_on
    slicing = Slicing.of(case.volume)
    with Library.create(
        path,
        bundle,
        intensity=case.intensity,
        engine=engine,
        precision=precision,
        threads=threads,
    ) as library:
        for index in case.annotated:
            planes = {name: slicing.view(mask, index) for name, mask in case.masks.items()}
            library.add(
                slicing.view(case.volume.array, index),
                {name: plane for name, plane in planes.items() if plane.any()},
                absent=tuple(name for name, plane in planes.items() if not plane.any()),
                key=f"slice-{index:03d}",
            )
            step(f"annotated slice {index}")


def _pooled_dice(found: list[NDArray[np.bool_]], truth: list[NDArray[np.bool_]]) -> float:
    both = sum(int((a & b).sum()) for a, b in zip(found, truth, strict=True))
    each = sum(int(a.sum()) + int(b.sum()) for a, b in zip(found, truth, strict=True))
    return 2 * both / each if each else 1.0


def _print_table(outcomes: Sequence[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Slices that were not annotated")
    for title in ("volume", "structure", "k", "memories"):
        table.add_column(title)
    for title in ("Dice", "by slice", "least", "uneven", "false slices", "s"):
        table.add_column(title, justify="right")
    for o in outcomes:
        table.add_row(
            o.volume, o.structure, str(o.k), str(o.memories), f"{o.dice:.3f}",
            f"{o.slice_dice:.3f}", f"{o.least_slice_dice:.3f}", f"{o.unevenness:.3f}",
            f"{o.false_slices} of {o.empty_slices}", f"{o.seconds:.1f}",
        )  # fmt: skip
    Console().print(table)
