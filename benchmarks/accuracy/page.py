"""The page that the accuracy benchmark leaves: one HTML file, nothing to fetch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from recallseg.benchmarks.accuracy.dataset import MOST_ANNOTATED
from recallseg.benchmarks.accuracy.measure import (
    COPY_EMBEDDING,
    COPY_POSITION,
    NO_POINTERS,
    RANDOM,
    RECALLED,
    REFERENCE_K,
    UNET,
    Case,
    Outcome,
)
from recallseg.benchmarks.accuracy.plots import line_plot
from recallseg.benchmarks.accuracy.report import AccuracyReport
from recallseg.benchmarks.accuracy.tables import (
    Summary,
    compare,
    false_positives,
    summarise,
    targets,
)
from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.reports.format import POLICY, STYLE
from recallseg.runtime.reports.pictures import Thumbnail, colour, legend

__all__ = ["render_page"]

WORST, BEST = 3, 2
STRUCTURES_SHOWN = 4
NOTHING = "&#8211;"
SPACING = "section > h3, .columns h3 { margin: 26px 0 10px; }"
METHODS = (RECALLED, RANDOM, NO_POINTERS)
COLUMNS = (
    (RECALLED, 1),
    (RECALLED, REFERENCE_K),
    (RECALLED, 16),
    (RANDOM, REFERENCE_K),
    (NO_POINTERS, REFERENCE_K),
    (COPY_EMBEDDING, 0),
    (COPY_POSITION, 0),
    (UNET, 0),
)
"""Methods and k of the overview."""
TITLE = "Accuracy on real images"


def render_page(outcomes: Sequence[Outcome], report: AccuracyReport) -> str:
    """Return the page."""
    body = "".join(
        (
            _head(report),
            _overview(outcomes),
            _targets(outcomes),
            *(_dataset(number, outcome) for number, outcome in enumerate(outcomes)),
            _provenance(outcomes, report),
        )
    )
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{POLICY}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>RecallSeg: {TITLE}</title><style>{style}{SPACING}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _head(report: AccuracyReport) -> str:
    bundle, settings = report.bundle, report.settings
    notice = f'<p class="notice">{escape(bundle.notice)}</p>' if bundle.notice else ""
    items = (
        f"bundle {bundle.name} ({bundle.image_size} px)",
        f"at most {MOST_ANNOTATED} annotated images",
        f"{settings['engine']}, {settings['precision']}",
        str(report.machine.get("processor", "")),
    )
    listed = "".join(f"<li>{escape(item)}</li>" for item in items)
    return (
        f'<header><p class="brand">RecallSeg</p><h1>{TITLE}</h1><ul class="facts">{listed}</ul>'
        f"{notice}</header><p>The networks have never seen these images, nor any real one. Each "
        "dataset gives at most 16 annotated images to recall, and queries that are none of "
        "them.</p>"
    )


def _overview(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        by_method = _by_method(summarise(outcome))
        for index, structure in enumerate(outcome.dataset.structures):
            cells = [by_method.get((structure, *column, MOST_ANNOTATED)) for column in COLUMNS]
            images = next((cell.images for cell in cells if cell), 0)
            values = "".join(
                f"<td>{f'<b>{_dice(c)}</b>' if i == 1 else _dice(c)}</td>"
                for i, c in enumerate(cells)
            )
            rows.append(
                f'<tr><th scope="row">{_swatch(index)}{escape(outcome.dataset.name)}: '
                f"{escape(structure)}</th><td>{images}</td>{values}</tr>"
            )
    head = (
        "Dataset and structure", "Images", "k = 1", "k = 8", "k = 16", "random, k = 8",
        "no pointers, k = 8", "copy nearest", "copy by place", "U-Net",
    )  # fmt: skip
    return (
        f"<section><h2>Mean Dice, 16 annotated images</h2>{_table(head, rows)}"
        '<p class="caption">Means over the queries that show the structure. Random: exemplars '
        "drawn at random instead of recalled, mean of several draws. No pointers: the same "
        "weights without SAM 2's object pointers. Copy: the mask of the annotated image that is "
        "nearest by embedding, or by place in the volume. U-Net: trained on the same images; it "
        "takes training, the others none.</p></section>"
    )


def _targets(outcomes: Sequence[Outcome]) -> str:
    rows = [
        f'<tr><th scope="row">{escape(outcome.dataset.name)}: {escape(target.structure)}</th>'
        f"<td>{target.wanted:.2f}</td><td><b>{_number(target.reached)}</b></td>"
        f"<td>{_number(target.pooled)}</td>"
        f"<td>{'reached' if target.met else 'not reached'}</td></tr>"
        for outcome in outcomes
        for target in targets(outcome)
    ]
    if not rows:
        return ""
    head = ("Dataset and structure", "Target", "Dice at k = 8", "all pixels pooled", "")
    return (
        f"<section><h2>Targets</h2>{_table(head, rows, 'narrow')}"
        '<p class="caption">In the mean over images a slice with a hundred pixels of a structure '
        "weighs as much as one with ten thousand; pooled it does not.</p></section>"
    )


def _dataset(number: int, outcome: Outcome) -> str:
    dataset = outcome.dataset
    summaries = summarise(outcome)
    trained = ""
    if outcome.training is not None:
        training = outcome.training
        trained = (
            f" The U-Net ({training.parameters / 1e6:.2f} M parameters) was trained for "
            f"{training.seconds:.0f} s ({training.steps} steps)."
        )
    human = "drawn by people" if dataset.human else "not drawn by people"
    return (
        f"<section><h2>{escape(dataset.name)} <small>{escape(dataset.modality)}</small></h2>"
        f'<p class="caption">{len(dataset.exemplars)} exemplars, {len(dataset.queries)} queries. '
        f"Reference: {escape(dataset.reference)} ({human}). {escape(dataset.remark)}"
        f"{escape(trained)}</p>{legend(dataset.structures, lines=False)}"
        f'<div class="columns"><div>{_by_k(outcome, summaries)}</div>'
        f"<div>{_by_count(outcome, summaries)}</div></div>"
        f"{_differences(outcome)}{_absent(outcome)}{_gallery(number, outcome)}</section>"
    )


def _by_k(outcome: Outcome, summaries: Sequence[Summary]) -> str:
    dashes = {RECALLED: "", RANDOM: "2 4", NO_POINTERS: "7 4"}
    lines = []
    xs = sorted({s.k for s in summaries if s.k})
    for index, structure in enumerate(outcome.dataset.structures):
        for method in METHODS:
            values = {
                s.k: s.dice
                for s in summaries
                if (s.structure, s.method, s.annotated) == (structure, method, MOST_ANNOTATED)
            }
            if values:
                lines.append((f"{structure}, {method}", index, dashes[method], values))
    return (
        "<h3>By k, 16 annotated images</h3>"
        f"{line_plot(lines, 'exemplars recalled (k)', xs)}"
        '<p class="caption">Solid: recalled; dotted: random; dashed: without object pointers.</p>'
    )


def _by_count(outcome: Outcome, summaries: Sequence[Summary]) -> str:
    lines = []
    xs: set[int] = set()
    for index, structure in enumerate(outcome.dataset.structures):
        values = {
            s.annotated: s.dice
            for s in summaries
            if s.structure == structure
            and s.method == RECALLED
            and s.k == min(REFERENCE_K, s.annotated)
        }
        xs |= set(values)
        lines.append((structure, index, "", values))
    return (
        f"<h3>By number of annotated images</h3>{line_plot(lines, 'annotated images', sorted(xs))}"
        '<p class="caption">k = 8, or all there are.</p>'
    )


def _differences(outcome: Outcome) -> str:
    found = {(d.structure, d.against): d for d in compare(outcome)}
    rivals = list(dict.fromkeys(against for _, against in found))
    rows = []
    for index, structure in enumerate(outcome.dataset.structures):
        cells = []
        for rival in rivals:
            d = found.get((structure, rival))
            said = NOTHING
            if d is not None:
                said = f"<b>{d.mean:+.3f}</b> <small>[{d.low:+.3f}, {d.high:+.3f}]</small>"
            cells.append(f"<td>{said}</td>")
        rows.append(
            f'<tr><th scope="row">{_swatch(index)}{escape(structure)}</th>{"".join(cells)}</tr>'
        )
    if not rivals:
        return ""
    return (
        "<h3>Recall at k = 8: Dice gained, image by image, over</h3>"
        f"{_table(('', *rivals), rows, 'narrow')}"
        '<p class="caption">Mean difference [95 % of the means when images are resampled].</p>'
    )


def _absent(outcome: Outcome) -> str:
    rows = [
        f'<tr><th scope="row">{_swatch(outcome.dataset.structures.index(f.structure))}'
        f"{escape(f.structure)}</th><td>{escape(f.method)}</td>"
        f"<td>{'other datasets' if f.foreign else 'this dataset'}</td>"
        f"<td>{f.positive} of {f.images}</td><td>{f.share:.1%}</td></tr>"
        for f in false_positives(outcome)
    ]
    head = ("Structure that is absent", "Method", "Images of", "False positives", "Mean area")
    return f"<h3>Where the structure is absent</h3>{_table(head, rows, 'narrow')}" if rows else ""


def _gallery(number: int, outcome: Outcome) -> str:
    """Return the queries of lowest and highest mean Dice at k = 8."""
    cases = [
        case
        for case in outcome.cases
        if (case.method, case.k, case.annotated, case.foreign)
        == (RECALLED, REFERENCE_K, MOST_ANNOTATED, False)
    ]
    mean = {
        name: float(np.mean([case.dice for case in cases if case.case == name]))
        for name in dict.fromkeys(case.case for case in cases)
    }
    ranked = sorted(mean, key=lambda name: mean[name])
    chosen = [(name, "worst") for name in ranked[:WORST]]
    chosen += [(name, "best") for name in ranked[WORST:][-BEST:]]
    queries = {query.name: query for query in outcome.dataset.queries}
    cards = [
        _card(f"d{number}q{i}", kind, mean[name], queries[name], outcome, cases)
        for i, (name, kind) in enumerate(chosen)
    ]
    return (
        f"<h3>Examples at k = 8: the {WORST} worst and {BEST} of the best</h3>"
        f"{legend(outcome.dataset.structures)}{''.join(cards)}"
    )


def _card(
    identifier: str, kind: str, mean: float, query: Annotated, outcome: Outcome, cases: list[Case]
) -> str:
    picture = Thumbnail(query.image, outcome.dataset.intensity)
    panels = [
        f'<figure><svg viewBox="{picture.view_box}">{picture.element(identifier)}</svg>'
        "<figcaption>query</figcaption></figure>"
    ]
    for index, name in enumerate(outcome.dataset.structures[:STRUCTURES_SHOWN]):
        mask = outcome.masks[query.name].get(name)
        if mask is None:
            continue
        layers = [f'<use href="#{identifier}"/>', picture.path(mask, "predicted", colour(index))]
        if name in query.masks:
            layers.append(picture.path(query.masks[name], "reference"))
        dice = [c.dice for c in cases if (c.case, c.structure) == (query.name, name)]
        said = f"<b>{dice[0]:.3f}</b>" if name in query.masks else "absent"
        if name not in query.masks and mask.any():
            said = "absent, but predicted"
        panels.append(
            f'<figure><svg viewBox="{picture.view_box}">{"".join(layers)}</svg><figcaption>'
            f"{_swatch(index)}{escape(name)} {said}</figcaption></figure>"
        )
    columns = max(len(panels), 4)
    return (
        f'<article><h3>{escape(query.name)}<span class="mean">{kind}, mean Dice {mean:.3f}</span>'
        f'</h3><div class="panels" style="--columns:{columns}">{"".join(panels)}</div></article>'
    )


def _provenance(outcomes: Sequence[Outcome], report: AccuracyReport) -> str:
    rows = [
        f'<tr><th scope="row">{escape(o.dataset.name)}</th>'
        f'<td style="white-space:normal;text-align:left">{escape(o.dataset.source)}</td>'
        f'<td style="white-space:normal;text-align:left">{escape(o.dataset.licence)}</td></tr>'
        for o in outcomes
    ]
    machine = {key: value for key, value in report.machine.items() if value is not None}
    entries = {
        "bundle": f"{report.bundle.name}, identity {report.bundle.identity}",
        "weights": report.weights,
        "settings": ", ".join(f"{key} {value}" for key, value in report.settings.items()),
        "machine": ", ".join(f"{key} {value}" for key, value in machine.items()),
        "versions": ", ".join(f"{key} {value}" for key, value in report.versions.items()),
        "left out": "; ".join(f"{name}: {why}" for name, why in report.missing.items()) or "none",
        "finished": report.created,
    }
    listed = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in entries.items()
    )
    return (
        '<section class="provenance"><h2>Images, licences, machine</h2>'
        f"{_table(('Dataset', 'Shipped in', 'Licence'), rows)}<br><dl>{listed}</dl></section>"
    )


def _table(head: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _by_method(summaries: Sequence[Summary]) -> dict[tuple[str, str, int, int], Summary]:
    return {(s.structure, s.method, s.k, s.annotated): s for s in summaries}


def _swatch(index: int) -> str:
    return f'<i class="swatch" style="background:{colour(index)}"></i>'


def _dice(summary: Summary | None) -> str:
    return NOTHING if summary is None else _number(summary.dice)


def _number(value: float | None) -> str:
    return NOTHING if value is None or math.isnan(value) else f"{value:.3f}"
