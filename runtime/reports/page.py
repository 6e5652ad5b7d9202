"""The page that an evaluation or the demo leaves: one HTML file, no scripts, nothing to fetch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from statistics import fmean
from typing import TYPE_CHECKING, Any

from recallseg.engines.reading import read_text
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.reports.cases import RECALLED, Arm, Case, Evaluation
from recallseg.runtime.reports.format import (
    POLICY,
    STYLE,
    milliseconds,
    number,
    plural,
    quartiles,
    spent,
)
from recallseg.runtime.reports.gallery import Gallery
from recallseg.runtime.reports.machine import describe_machine, package_versions
from recallseg.runtime.reports.paired import budgets, by_group, differences
from recallseg.runtime.reports.pictures import Source, colour, legend
from recallseg.runtime.reports.plot import dice_plot
from recallseg.runtime.reports.summary import (
    StructureSummary,
    latency,
    summarise,
)
from recallseg.runtime.segmenting.result import STAYS_OUT

if TYPE_CHECKING:
    from recallseg.runtime.library import Library

__all__ = ["Settings", "render_report"]

STAGES = {
    "prepare": "prepare image",
    "embed": "embed (DINOv2)",
    "search": "search library",
    "encode": "encode (SAM 2)",
    "gather": "gather memories",
    "attend": "attend to memories",
    "decode": "decode masks",
    "finish": "finish masks",
    "total": "total",
}


@dataclass(frozen=True)
class Settings:
    """What was run, on what: the head of every report and summary."""

    title: str
    notice: str
    bundle: str
    weights: str
    bundle_identity: str
    library: str
    library_digest: str
    memory_format: str
    exemplars: int
    engine: str
    precision: str
    threads: int | None
    intensity: Intensity
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    finished: str

    @classmethod
    def of(
        cls, library: Library, title: str, engine: str, precision: str, threads: int | None
    ) -> Settings:
        """Collect the settings of a run that ends now."""
        bundle = library.bundle
        g = bundle.geometry
        return cls(
            title=title,
            notice=bundle.notice,
            bundle=f"{bundle.name} ({g.image_size} px, {g.embed_size} px to embed)",
            weights=f"{bundle.segmenter.architecture} ({bundle.segmenter.source}), "
            f"{bundle.embedder.architecture} ({bundle.embedder.source})",
            bundle_identity=bundle.identity,
            library=str(library.path),
            library_digest=library.digest,
            memory_format=library.memory_format,
            exemplars=len(library),
            engine=engine,
            precision=precision,
            threads=threads,
            intensity=library.intensity,
            machine=describe_machine(),
            versions=package_versions(),
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            **vars(self),
            "intensity": self.intensity.to_json(),
            "machine": dict(self.machine),
            "versions": dict(self.versions),
        }


def render_report(evaluation: Evaluation, settings: Settings, source: Source) -> str:
    """Return the page.

    Parameters
    ----------
    source : gives an exemplar's image and masks by key, or None if they were not kept.
    """
    summaries = summarise(evaluation)
    body = "".join(
        (
            _head(settings, evaluation),
            _figures(evaluation, summaries),
            _summary(evaluation, summaries),
            _heads(evaluation),
            _volumes(evaluation),
            _groups(evaluation),
            _differences(evaluation),
            _budgets(evaluation),
            _charts(evaluation),
            _remarks(evaluation),
            Gallery(evaluation, settings.intensity, source).render(),
            _provenance(settings, evaluation),
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{POLICY}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(settings.title)}</title><style>{read_text(STYLE)}</style>"
        f"</head><body><main>{body}</main></body></html>\n"
    )


def _head(settings: Settings, evaluation: Evaluation) -> str:
    names = len({timing.case for timing in evaluation.timings})
    facts = (
        plural(names, "image"),
        f"{plural(settings.exemplars, 'exemplar')} in the library",
        f"k = {', '.join(map(str, evaluation.ks))}",
        f"{settings.engine}, {settings.precision}",
        str(settings.machine.get("processor", "")),
    )
    notice = f'<p class="notice">{escape(settings.notice)}</p>' if settings.notice else ""
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f'<header><p class="brand">RecallSeg</p><h1>{escape(settings.title)}</h1>'
        f'<ul class="facts">{items}</ul>{notice}</header>'
    )


def _figures(evaluation: Evaluation, summaries: tuple[StructureSummary, ...]) -> str:
    """Return the few numbers that one looks for first, at the largest k."""
    k = max(evaluation.ks)
    cards = [
        (f"Dice, {s.structure}", number(s.dice["median"], 3), quartiles(s.dice, 3), colour(i))
        for i, s in enumerate(s for s in summaries if (s.method, s.k) == (RECALLED, k))
    ]
    total = latency(evaluation)[k].get("total", {})
    fastest = milliseconds(total.get("p50", math.nan)), milliseconds(total.get("p90", math.nan))
    cards.append(("Latency per image", fastest[0], f"90 % under {fastest[1]}", "var(--faint)"))
    html = "".join(
        f'<div class="figure" style="--c:{fill}"><span>{escape(label)}</span><b>{value}</b>'
        f"<small>{escape(note)}</small></div>"
        for label, value, note, fill in cards
    )
    return f'<section class="figures">{html}</section><p class="caption">Medians at k = {k}.</p>'


def _summary(evaluation: Evaluation, summaries: tuple[StructureSummary, ...]) -> str:
    unit = "mm" if evaluation.in_mm else "px"
    rows = []
    for s in summaries:
        fill = colour(evaluation.structures.index(s.structure))
        swatch = f'<i class="swatch" style="background:{fill}"></i>'
        cells = (
            str(s.present),
            f"<b>{number(s.dice['median'], 3)}</b> <small>{quartiles(s.dice, 3)}</small>",
            number(s.dice["mean"], 3),
            number(s.dice["worst"], 3),
            f"{number(s.iou['median'], 3)} <small>{quartiles(s.iou, 3)}</small>",
            f"{number(s.hd95['median'], 1)} <small>{quartiles(s.hd95, 1)}</small>",
            number(s.surface_dice["median"], 3),
            str(s.missed),
            f"{s.false_positives} of {s.absent}" if s.absent else "-",
            str(s.flagged),
        )
        rows.append(
            f'<tr><th scope="row">{swatch}{escape(s.structure)}</th>'
            f"<td>{_way(Arm(s.method, s.k))}</td>"
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    titles = (
        "Structure", "Method", "Images", "Dice", "mean", "worst", "IoU", f"HD95 ({unit})",
        f"Surface Dice ({evaluation.tolerance:g} {unit})", "Missed", "False positives", "Flagged",
    )  # fmt: skip
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    return (
        '<section><h2>Agreement with the reference</h2><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="caption">Median [quartiles] over the images that show the structure. Missed: it '
        "is there, the mask is empty. False positives: it is absent, the mask is not empty. "
        "Flagged: the quality flag says that a person should look.</p></section>"
    )


def _way(arm: Arm) -> str:
    """Name a way of segmenting."""
    if arm.method == RECALLED:
        return f"recalled, k = {arm.k}"
    return arm.method + (f", k = {arm.k}" if arm.method == "match" else "")


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    """Return a section with a table whose first cells are escaped texts; empty without rows."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(one)}</th>' for one in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{c}</td>" for c in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<section><h2>{escape(title)}</h2><div class="scroll"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
        f'<p class="caption">{escape(note)}</p></section>'
    )


JUDGED = {
    "groups": "judged by groups (patients, series or volumes) that it had not seen",
    "exemplars": "judged by exemplars that it had not seen, though maybe others of their patients",
    "blocks": "judged by other slices of one patient",
}
"""By what was left out in turn."""


def _heads(evaluation: Evaluation) -> str:
    """Return what the library's head was expected to do, beside what it did."""
    rows, said = [], []
    cases: dict[tuple[str, int], list[Case]] = {}
    for case in evaluation.cases:
        if case.method == RECALLED and not case.annotated:
            cases.setdefault((case.structure, case.k), []).append(case)
    for k, head in evaluation.heads.items():
        age = f"fitted {head.created} on {head.exemplars} of {head.of} exemplars"
        state = f"{head.older or head.why or 'in use'}; {JUDGED[head.grouping]}"
        said.append(f"k = {k}: head {head.digest[:12]}, {age}; {state}")
        for name, choice in head.choices.items():
            uses = head.used and choice.used
            share = f"{choice.mix:.0%}" if uses else escape(choice.why or head.why)
            own = cases.get((name, k), ())
            results = [(case.nearest_distance, case.iou_estimate, case.present) for case in own]
            here = choice.over(results) if head.why in ("", STAYS_OUT) else None
            cells = (
                number(choice.alone, 3),
                f"{choice.expected:.3f} ({choice.interval[0]:.3f} to {choice.interval[1]:.3f})",
                f"{choice.low:+.3f} to {choice.high:+.3f}" if uses else "-",
                "-"
                if here is None
                else f"{here.dice:.3f} ({here.low:.3f} to {here.high:.3f})"
                + (", some beyond" if here.beyond else ""),
                number(fmean(case.dice for case in own) if own else math.nan, 3),
            )
            rows.append((escape(name), str(k), share, *cells))
    return _table(
        "The library's head",
        ("Structure", "k", "Share in the logits", "Memory attention alone, expected",
         "Dice expected", "Gain expected", "Dice expected of these results", "Mean Dice found"),
        rows,
        f"{'. '.join(said)}. Expected when it was fitted, of exemplars that it had not seen, with "
        "95 % intervals. Expected of these results: as far from the library, and with the IoU "
        "estimates that they have; beyond: farther, or of a lower estimate, than all exemplars "
        "that it was judged by. Found here, with memory attention and head, in the same images: "
        "one without the structure counts 1 if none of it is found, else 0.",
    )  # fmt: skip


def _volumes(evaluation: Evaluation) -> str:
    unit = "mm" if evaluation.in_mm else "px"
    return _table(
        "Volumes as a whole",
        ("Volume", "Structure", "Method", "Slices", "Dice", f"HD95 ({unit})",
         f"Surface Dice ({evaluation.tolerance:g} {unit})", "Volume difference"),
        [
            (
                escape(v.volume),
                escape(v.structure),
                _way(v.arm),
                str(v.slices),
                f"<b>{number(v.dice, 3)}</b>",
                number(v.hd95, 1),
                number(v.surface_dice, 3),
                _percent(v.volume_difference),
            )
            for v in evaluation.volumes
            if not v.annotated
        ],
        "All voxels of a volume in three dimensions. Volume difference: predicted less reference, "
        "as a share of the reference.",
    )  # fmt: skip


def _groups(evaluation: Evaluation) -> str:
    unit = evaluation.unit
    return _table(
        f"By {unit}",
        ("Structure", "Of", "Method", f"{unit.capitalize()}s", "Mean Dice", "95 % interval",
         f"Worst {unit}"),
        [
            (
                escape(g.structure),
                "volumes" if g.three_d else "images",
                _way(g.arm),
                str(g.groups),
                f"<b>{number(g.mean, 3)}</b>",
                _interval(g.low, g.high),
                number(g.worst, 3),
            )
            for g in by_group(evaluation)
        ],
        f"Each {unit} counts once. Interval: bootstrap over {unit}s"
        + ("" if unit == "patient" else ", too narrow where several are of one patient")
        + (f". No exemplar of a query's own {unit} was recalled." if evaluation.split else "."),
    )  # fmt: skip


def _differences(evaluation: Evaluation) -> str:
    unit = evaluation.unit
    return _table(
        "Against others, on the same images",
        ("Structure", "Method", "Less that of", f"{unit.capitalize()}s", "Difference in Dice",
         "95 % interval"),
        [
            (
                escape(d.structure),
                _way(d.arm),
                _way(d.other),
                str(d.groups),
                f"<b>{d.mean:+.3f}</b>",
                _interval(d.low, d.high, signed=True),
            )
            for d in differences(evaluation)
        ],
        f"Mean over {unit}s of paired differences. An interval that holds 0 tells nothing apart; "
        f"with few {unit}s it is too narrow.",
    )  # fmt: skip


def _budgets(evaluation: Evaluation) -> str:
    return _table(
        "By number of annotated images",
        ("Structure", "Method", "Annotated", "Draws", "Mean Dice", "Deviation", "Range"),
        [
            (
                escape(b.structure),
                b.method,
                str(b.annotated) + (" (all)" if b.annotated == evaluation.exemplars else ""),
                str(b.draws),
                f"<b>{number(b.mean, 3)}</b>",
                number(b.deviation, 3),
                f"{number(b.lowest, 3)} to {number(b.highest, 3)}",
            )
            for b in budgets(evaluation)
        ],
        "Annotated images are drawn at random; deviation and range are over draws. A structure "
        "that no drawn image shows counts as missed.",
    )


def _interval(low: float, high: float, *, signed: bool = False) -> str:
    if math.isnan(low):
        return "one group only"
    return f"[{low:+.3f}, {high:+.3f}]" if signed else f"[{low:.3f}, {high:.3f}]"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:+.0f} %"


def _charts(evaluation: Evaluation) -> str:
    values: dict[tuple[int, str], list[float]] = {}
    for k in evaluation.ks:
        for name in evaluation.structures:
            values[k, name] = [
                row.dice
                for row in evaluation.cases
                if (row.structure, row.arm) == (name, Arm(RECALLED, k)) and row.reference_volume > 0
            ]
    by_k = latency(evaluation)
    stages = dict.fromkeys(stage for stages in by_k.values() for stage in stages)
    head = "".join(f'<th scope="col">k = {k}</th>' for k in by_k)
    rows = "".join(
        f'<tr class="{"total" if stage == "total" else ""}"><th scope="row">'
        f"{escape(STAGES.get(stage, stage))}</th>"
        + "".join(f"<td>{spent(by_k[k].get(stage))}</td>" for k in by_k)
        + "</tr>"
        for stage in stages
    )
    return (
        '<section class="columns"><div><h2>Dice by k</h2>'
        f"{legend(evaluation.structures, lines=False)}"
        f'<div class="scroll">{dice_plot(values)}</div></div>'
        '<div><h2>Latency by stage</h2><div class="scroll"><table class="narrow"><thead><tr>'
        f'<th scope="col">Stage</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        '<p class="caption">Median in milliseconds, 90th percentile in small print; the first '
        "image is run once before the clock counts.</p></div></section>"
    )


def _remarks(evaluation: Evaluation) -> str:
    parts = []
    if evaluation.unmentioned:
        names = ", ".join(map(escape, evaluation.unmentioned[:20]))
        parts.append(
            f"<p><b>{plural(len(evaluation.unmentioned), 'source')} left out:</b> nothing is said "
            f"there of these structures ({names}).</p>"
        )
    for name, why in evaluation.failures.items():
        parts.append(f"<p><b>{escape(name)} could not be evaluated:</b> {escape(why)}</p>")
    return f'<section class="remarks">{"".join(parts)}</section>' if parts else ""


def _provenance(settings: Settings, evaluation: Evaluation) -> str:
    machine = settings.machine
    memory = machine.get("memory_bytes")
    intensity = settings.intensity
    rows = {
        "Bundle": settings.bundle,
        "Weights": settings.weights,
        "Bundle identity": settings.bundle_identity,
        "Library": f"{settings.library} ({plural(settings.exemplars, 'exemplar')}, "
        f"memories in {settings.memory_format})",
        "Library digest": settings.library_digest,
        "Engine": f"{settings.engine}, {settings.precision}, "
        f"{settings.threads or machine.get('usable_cores')} threads",
        "Intensities": f"{intensity.mode} {intensity.low:g} to {intensity.high:g}",
        "Workspace": ", ".join(
            f"{size / 2**20:.0f} MiB at k = {k}" for k, size in evaluation.workspace_bytes.items()
        ),
        "Machine": f"{machine.get('processor')}, {machine.get('usable_cores')} of "
        f"{machine.get('cores')} cores, {memory / 2**30 if memory else math.nan:.1f} GiB",
        "System": f"{machine.get('system')}, {machine.get('architecture')}, "
        f"Python {machine.get('python')}",
        "Packages": ", ".join(f"{name} {version}" for name, version in settings.versions.items()),
        "Finished": settings.finished,
    }
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items()
    )
    return f'<section class="provenance"><h2>What made these results</h2><dl>{items}</dl></section>'
