"""An evaluation in numbers and files: summary, CSV files, ``summary.json``, ``report.html``."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recallseg.engines.durable import make_folder, replace_file
from recallseg.runtime.json_text import json_text, printable
from recallseg.runtime.reports.cases import Case, Evaluation, VolumeCase
from recallseg.runtime.reports.format import csv_text
from recallseg.runtime.reports.paired import budgets, by_group, differences

if TYPE_CHECKING:
    from recallseg.runtime.reports.page import Settings

__all__ = [
    "StructureSummary",
    "latency",
    "summarise",
    "to_csv",
    "write_evaluation",
]

SCHEMA = "recallseg-evaluation/2"
WORST = 5


@dataclass(frozen=True)
class StructureSummary:
    """One structure, method and k, with all exemplars.

    Dice, IoU, HD95 and surface Dice are over images that show the structure: where it is absent, a
    correct empty mask would count as 1 and flatter the rest; those are counted instead.

    Attributes
    ----------
    present, absent : images that show the structure, and that are known not to.
    dice, iou, hd95, surface_dice : ``median, q1, q3, mean, worst``; NaN without values. HD95
        leaves out the missed ones.
    missed : images that show the structure, but the predicted mask is empty.
    false_positives : images without the structure whose predicted mask is not empty.
    flagged : images whose quality flag is ``suspect``.
    worst : (image, Dice), lowest first.
    """

    structure: str
    method: str
    k: int
    present: int
    absent: int
    dice: dict[str, float]
    iou: dict[str, float]
    hd95: dict[str, float]
    surface_dice: dict[str, float]
    missed: int
    false_positives: int
    flagged: int
    worst: tuple[tuple[str, float], ...]


def summarise(evaluation: Evaluation) -> tuple[StructureSummary, ...]:
    """Summarise by structure, method and k, in the order asked for."""
    summaries = []
    for structure in evaluation.structures:
        for arm in evaluation.arms:
            if arm.annotated:
                continue
            rows = [
                row for row in evaluation.cases if row.structure == structure and row.arm == arm
            ]
            present = sorted((r for r in rows if r.reference_volume > 0), key=lambda row: row.dice)
            absent = [row for row in rows if row.reference_volume == 0]
            summaries.append(
                StructureSummary(
                    structure=structure,
                    method=arm.method,
                    k=arm.k,
                    present=len(present),
                    absent=len(absent),
                    dice=_spread([row.dice for row in present], worst=min),
                    iou=_spread([row.iou for row in present], worst=min),
                    hd95=_spread([row.hd95 for row in present], worst=max),
                    surface_dice=_spread([row.surface_dice for row in present], worst=min),
                    missed=sum(row.predicted_volume == 0 for row in present),
                    false_positives=sum(row.predicted_volume > 0 for row in absent),
                    flagged=sum(row.quality == "suspect" for row in rows),
                    worst=tuple((row.case, row.dice) for row in present[:WORST]),
                )
            )
    return tuple(summaries)


def latency(evaluation: Evaluation) -> dict[int, dict[str, dict[str, float]]]:
    """Return p50, p90 and p99 in ms by k and stage, ``total`` last."""
    result: dict[int, dict[str, dict[str, float]]] = {}
    for k in evaluation.ks:
        stages: dict[str, list[float]] = {}
        for timing in evaluation.timings:
            if timing.k == k:
                for stage, ms in timing.stages.items():
                    stages.setdefault(stage, []).append(ms)
        result[k] = {
            stage: {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
            for stage, values in stages.items()
        }
    return result


def to_csv(cases: Sequence[Case] | Sequence[VolumeCase]) -> str:
    """Return the rows as CSV (RFC 4180 quoting, LF line ends); what is undefined is empty.

    Of no rows the header of images is returned.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(cases[0] if cases else Case)]
    writer.writerow(names)
    for case in cases:
        writer.writerow([_cell(getattr(case, name)) for name in names])
    return text.getvalue()


def to_json(evaluation: Evaluation, settings: Settings) -> dict[str, Any]:
    """Return the summary as JSON values; undefined numbers are null."""
    document = {
        "schema": SCHEMA,
        "notice": settings.notice,
        "settings": settings.to_json(),
        "unit": "mm" if evaluation.in_mm else "pixels",
        "structures": [
            {**vars(s), "worst": [{"case": case, "dice": dice} for case, dice in s.worst]}
            for s in summarise(evaluation)
        ],
        "volumes": [
            {**vars(v), "volume_difference": v.volume_difference}
            for v in evaluation.volumes
            if not v.annotated
        ],
        "groups": [{**vars(g), "arm": vars(g.arm)} for g in by_group(evaluation)],
        "differences": [
            {**vars(d), "arm": vars(d.arm), "other": vars(d.other)} for d in differences(evaluation)
        ],
        "budgets": [vars(budget) for budget in budgets(evaluation)],
        "exemplars": evaluation.exemplars,
        "split": evaluation.split,
        "grouped_by": evaluation.unit,
        "tolerance": evaluation.tolerance,
        "latency_ms": {str(k): stages for k, stages in latency(evaluation).items()},
        "workspace_bytes": {str(k): size for k, size in evaluation.workspace_bytes.items()},
        "provenance": {str(k): made.to_json() for k, made in evaluation.provenance.items()},
        "heads": {str(k): head.to_json() for k, head in evaluation.heads.items()},
        "unmentioned": list(evaluation.unmentioned),
        "notes": {name: list(notes) for name, notes in evaluation.notes.items()},
        "failures": dict(evaluation.failures),
    }
    cleaned: dict[str, Any] = _without_nan(document)
    return cleaned


def write_evaluation(
    evaluation: Evaluation, settings: Settings, page: str, output: Path
) -> dict[str, Any]:
    """Write ``cases.csv``, ``summary.json`` and ``report.html`` into ``output``, each in full.

    And ``volumes.csv``, if there are whole volumes. Returns what ``summary.json`` holds.

    Raises
    ------
    OSError
        If the folder cannot be written.
    """
    make_folder(output)
    written = {"cases.csv": to_csv(evaluation.cases)}
    if evaluation.volumes:
        written["volumes.csv"] = to_csv(evaluation.volumes)
    else:
        (output / "volumes.csv").unlink(missing_ok=True)  # of an earlier evaluation
    summary = to_json(evaluation, settings)
    written["summary.json"] = json_text(summary)
    written["report.html"] = page
    for name, text in written.items():  # names in them may be of bytes that are no text
        replace_file(output / name, printable(text, lines=True).encode())
    return summary


def _spread(values: Sequence[float], worst: Any) -> dict[str, float]:
    finite = [value for value in values if not math.isnan(value)]
    if not finite:
        return dict.fromkeys(("median", "q1", "q3", "mean", "worst"), math.nan)
    q1, median, q3 = (float(q) for q in np.percentile(finite, [25, 50, 75]))
    mean = float(np.mean(finite))
    return {"median": median, "q1": q1, "q3": q3, "mean": mean, "worst": float(worst(finite))}


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return csv_text(" ".join(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return csv_text(value) if isinstance(value, str) else str(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
