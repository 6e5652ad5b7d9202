"""Pictures of a segmented volume: a contact sheet, and a page with every slice that matters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.engines.reading import read_text
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.reports.format import POLICY, STYLE
from recallseg.runtime.reports.outlined import (
    LEGEND,
    draw_legend,
    draw_mark,
    draw_outlines,
    fitted,
)
from recallseg.runtime.reports.pictures import Source, Thumbnail, colour, legend
from recallseg.runtime.volumes.slices import SliceRecord, VolumeResult

__all__ = ["contact_sheet", "render_volume_page"]

TILE = 224
COLUMNS = 6
MOST_TILES = 30
MOST_SLICES = 40
EXEMPLAR_SIDE = 110
MOST_RECALLED = 6


def contact_sheet(volume: Volume, result: VolumeResult, intensity: Intensity) -> bytes:
    """Return a PNG: up to 30 slices over the structures' extent, undistorted, with outlines."""
    chosen = _spread(_extent(result), MOST_TILES)
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    sheet = np.zeros((rows * TILE + LEGEND, columns * TILE, 3), np.uint8)
    for position, record in enumerate(chosen):
        top, left = divmod(position, columns)
        tile = _tile(volume, result, intensity, record)
        sheet[top * TILE : (top + 1) * TILE, left * TILE : (left + 1) * TILE] = tile
    draw_legend(sheet, result.labels, result.notice)
    _, data = cv2.imencode(".png", sheet)
    return data.tobytes()


def render_volume_page(
    volume: Volume,
    result: VolumeResult,
    intensity: Intensity,
    source: Source,
    title: str,
) -> str:
    """Return one HTML file, without scripts and with nothing to fetch.

    Parameters
    ----------
    source : gives an exemplar's image and masks by key, or None if they were not kept.
    title : what is shown; it is escaped.
    """
    exemplars: dict[str, str] = {}
    cards = [
        _card(volume, result, intensity, record, source, exemplars)
        for record in _spread(_extent(result), MOST_SLICES)
    ]
    sizes = result.to_json(volume)
    amounts = []
    for name in result.labels:
        amount = f"{sizes['voxels'][name]} voxels"
        if sizes["millilitres"] is not None:
            amount += f", {sizes['millilitres'][name]:.1f} ml"
        if name in result.cleaned:
            change = result.cleaned[name]
            amount += (
                f"; clean-up took {change.voxels_removed} voxels in {change.parts_removed} parts "
                f"away and filled {change.voxels_filled}"
            )
        amounts.append(f"<tr><th>{escape(name)}</th><td>{amount}</td></tr>")
    how = (
        f"memories of up to {result.propagated} slices beside it"
        if result.propagated
        else "each slice alone"
    )
    recipe = result.provenance.recipe
    facts = (
        f"{len(result.slices)} {result.slicing.plane} slices, {how}, k = {recipe.k}, "
        f"{recipe.engine} {recipe.precision}, {result.milliseconds / 1e3:.1f} s; bundle "
        f"{recipe.bundle_identity[:12]}, library {result.provenance.library_digest[:12]}"
    )
    notice = f'<p class="notice">{escape(result.notice)}</p>' if result.notice else ""
    symbols = "".join(exemplars.values())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"{POLICY}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{read_text(STYLE)}</style></head>"
        f"<body><main><header><h1>{escape(title)}</h1>{notice}<p>{escape(facts)}</p></header>"
        f"<section><h2>Structures</h2><table>{''.join(amounts)}</table></section>"
        f"<section><h2>Along the axis</h2>{legend(list(result.labels), lines=False)}"
        f"{_profile(result)}</section>"
        f'<svg class="store" aria-hidden="true">{symbols}</svg>'
        f"<section><h2>Slices</h2>{''.join(cards)}</section></main></body></html>"
    )


def _extent(result: VolumeResult) -> Sequence[SliceRecord]:
    """Return the slices from the first to the last that shows something, and one beyond; or all."""
    shown = [i for i, record in enumerate(result.slices) if any(record.pixels.values())]
    if not shown:
        return result.slices
    return result.slices[max(0, shown[0] - 1) : shown[-1] + 2]


def _spread(records: Sequence[SliceRecord], most: int) -> list[SliceRecord]:
    picked = np.unique(
        np.linspace(0, len(records) - 1, min(most, len(records))).round().astype(int)
    )
    return [records[int(i)] for i in picked]


def _masks(result: VolumeResult, index: int) -> Iterator[NDArray[np.bool_]]:
    """Yield each structure's mask of a slice, upright, with what it shares with others."""
    slicing, shape = result.slicing, result.label_map.shape
    labels = np.ascontiguousarray(slicing.view(result.label_map, index))
    thin = (*shape[: slicing.axis], 1, *shape[slicing.axis + 1 :])
    stride = int(np.prod(shape[slicing.axis + 1 :]))
    for name, value in result.labels.items():
        mask = labels == value
        shared = result.shared.get(name)
        if shared is not None:
            here = shared[shared // stride % shape[slicing.axis] == index]
            places = list(np.unravel_index(here, shape))
            places[slicing.axis] = np.zeros_like(here)
            plane = np.zeros(thin, bool)
            plane[tuple(places)] = True
            mask |= slicing.view(plane, 0)
        yield mask


def _tile(
    volume: Volume, result: VolumeResult, intensity: Intensity, record: SliceRecord
) -> NDArray[np.uint8]:
    slicing = result.slicing
    image = slicing.view(volume.array, record.index)
    size = fitted(image, slicing.spacing(volume), TILE)
    tile = np.zeros((TILE, TILE, 3), np.uint8)
    top, left = (TILE - size[1]) // 2, (TILE - size[0]) // 2
    tile[top : top + size[1], left : left + size[0]] = draw_outlines(
        image, _masks(result, record.index), intensity, size
    )
    draw_mark(tile, f"{record.index}{' ?' if record.flag == 'suspect' else ''}", record.flag)
    return tile


def _profile(result: VolumeResult) -> str:
    """Return a plot: area of each structure by slice, and below it which slices are suspect."""
    width, height, mark = 900, 160, 10
    count = max(1, len(result.slices))
    most = max((max(r.pixels.values(), default=0) for r in result.slices), default=0) or 1
    step = width / count
    lines = []
    for position, name in enumerate(result.labels):
        points = " ".join(
            f"{(i + 0.5) * step:.1f},{height * (1 - r.pixels.get(name, 0) / most):.1f}"
            for i, r in enumerate(result.slices)
        )
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colour(position)}" '
            'stroke-width="2"/>'
        )
    flags = "".join(
        f'<rect x="{i * step:.1f}" y="{height + 6}" width="{step:.1f}" height="{mark}" '
        f'fill="#e0623a"><title>slice {r.index}: {escape(_why(r))}</title></rect>'
        for i, r in enumerate(result.slices)
        if r.flag == "suspect"
    )
    return (
        f'<svg viewBox="0 0 {width} {height + mark + 24}" role="img" aria-label="area by slice">'
        f'<line x1="0" y1="{height}" x2="{width}" y2="{height}" stroke="currentColor" '
        f'stroke-opacity=".3"/>{"".join(lines)}{flags}'
        f'<text x="0" y="{height + mark + 20}" font-size="11" fill="currentColor">slice 0; '
        f'orange: suspect</text><text x="{width}" y="{height + mark + 20}" font-size="11" '
        f'text-anchor="end" fill="currentColor">slice {count - 1}</text></svg>'
    )


def _why(record: SliceRecord) -> str:
    return "; ".join(f"{name}: {why}" for name, all_of in record.reasons.items() for why in all_of)


def _card(
    volume: Volume,
    result: VolumeResult,
    intensity: Intensity,
    record: SliceRecord,
    source: Source,
    exemplars: dict[str, str],
) -> str:
    slicing = result.slicing
    image = slicing.view(volume.array, record.index)
    picture = Thumbnail(np.ascontiguousarray(image), intensity)
    row_mm, column_mm = slicing.spacing(volume)
    stretch = (
        f'preserveAspectRatio="none" style="aspect-ratio:{image.shape[1] * column_mm:.4g}/'
        + (f'{image.shape[0] * row_mm:.4g}"')
    )
    identifier = f"s{record.index}"
    layers = [
        picture.path(mask, "predicted", colour(index))
        for index, mask in enumerate(_masks(result, record.index))
    ]
    panels = [
        f'<figure><svg viewBox="{picture.view_box}" {stretch}>{picture.element(identifier)}</svg>'
        "<figcaption>slice</figcaption></figure>",
        f'<figure><svg viewBox="{picture.view_box}" {stretch}><use href="#{identifier}"/>'
        f"{''.join(layers)}</svg>"
        "<figcaption>segmented</figcaption></figure>",
    ]
    panels += _recalled(record, intensity, source, exemplars, list(result.labels))
    reasons = _why(record)
    why = f'<p class="reasons">{escape(reasons)}</p>' if reasons else ""
    return (
        f'<article><h3>slice {record.index}<span class="flag {escape(record.flag)}">'
        f"{escape(record.flag)}</span></h3>"
        f'<div class="panels" style="--columns:{len(panels)}">{"".join(panels)}</div>'
        f"{why}</article>"
    )


def _recalled(
    record: SliceRecord,
    intensity: Intensity,
    source: Source,
    exemplars: dict[str, str],
    structures: list[str],
) -> list[str]:
    """Return figures of the exemplars that the slice recalled, nearest first."""
    nearest: dict[str, float] = {}
    for found in record.recalled.values():
        for recalled in found:
            nearest.setdefault(recalled.key, recalled.distance)
    figures = []
    for key in sorted(nearest, key=lambda k: nearest[k])[:MOST_RECALLED]:
        if key not in exemplars:
            kept = source(key)
            if kept is None:
                continue
            picture = Thumbnail(kept[0], intensity, EXEMPLAR_SIDE)
            number = len(exemplars)
            paths = "".join(
                picture.path(mask, "predicted", colour(structures.index(name)))
                for name, mask in kept[1].items()
                if name in structures
            )
            exemplars[key] = (
                f'<symbol id="e{number}" viewBox="{picture.view_box}">'
                f"{picture.element(f'p{number}')}{paths}</symbol>"
            )
        position = list(exemplars).index(key)
        figures.append(
            f'<figure class="exemplar"><svg viewBox="0 0 100 100"><use href="#e{position}"/></svg>'
            f"<figcaption>{escape(key)} {nearest[key]:.3f}</figcaption></figure>"
        )
    return figures
