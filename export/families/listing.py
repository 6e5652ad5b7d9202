"""What can be exported: families, architectures, licences and what they cost."""

from __future__ import annotations

import json
from typing import Any

from recallseg.engines.reading import read_text
from recallseg.export.families.counting import COUNTED, SIZES

__all__ = ["networks", "networks_table"]

_APACHE = "Apache-2.0"
_SOURCES = {
    "sam2": ("Meta's .pt, a folder of sam2_video or sam2; fine-tuned files (MedSAM2)", _APACHE),
    "edgetam": ("Meta's edgetam.pt, a folder of edgetam_video", _APACHE),
    "dinov2": ("Meta's .pth, a folder of dinov2 or dinov2_with_registers", _APACHE),
    "dinov3": ("a folder of dinov3_vit or dinov3_convnext", "DINOv3 License, gated"),
    "other": ("any folder that transformers' AutoModel reads, with a pooled output", "its own"),
}


def _family(name: str) -> str:
    return next((f for f in ("edgetam", "dinov2", "dinov3") if name.startswith(f)), "sam2")


def networks() -> list[dict[str, Any]]:
    """Return one entry for each architecture: what it is, where it comes from, what it costs.

    ``graphs`` (of segmenters, by image size in pixels) holds ``gflop`` and ``mb`` (fp32) of each
    graph, for one structure and the number of memories in ``k``; ``memory_bytes_fp16`` what one
    exemplar and structure takes in a library. All counted, none measured.
    """
    data = json.loads(read_text(COUNTED))
    found: list[dict[str, Any]] = []
    for name, sizes in data["segmenters"].items():
        source, licence = _SOURCES[_family(name)]
        first = next(iter(sizes.values()))
        found.append(
            {
                "kind": "segmenter",
                "name": name if name == "edgetam" else f"sam2.1-hiera-{name}",
                "random": f"random:{name}",
                "family": _family(name),
                "sources": source,
                "licence": licence,
                "parameters": first["parameters"],
                "k": data["k"],
                "sizes": {
                    size: {key: value for key, value in counted.items() if key != "parameters"}
                    for size, counted in sizes.items()
                },
            }
        )
    for name, counted in data["embedders"].items():
        source, licence = _SOURCES[_family(name)]
        found.append(
            {
                "kind": "embedder",
                "name": name,
                "random": f"random:{name.removeprefix('dinov2-')}",
                "family": _family(name),
                "sources": source,
                "licence": licence,
                "sizes": {str(data["embed_size"]): counted},
                "parameters": counted["parameters"],
            }
        )
    source, licence = _SOURCES["other"]
    found.append(
        {"kind": "embedder", "name": "any other", "family": "other", "sources": source,
         "licence": licence}
    )  # fmt: skip
    return found


def networks_table() -> str:
    """Return the same as text for people."""
    entries = networks()
    lines = [
        "Segmenters: GFLOP of each graph for one structure and k = 4 memories, and fp16 memory of "
        "one exemplar, counted",
        f"  {'name':<24}{'parameters':>11}  {'px':>5}{'encode':>9}{'memorize':>10}{'attend':>9}"
        f"{'decode':>9}{'memory':>11}  licence",
    ]
    for entry in entries:
        for size in SIZES if entry["kind"] == "segmenter" else ():
            counted = entry["sizes"][str(size)]
            gflop = "".join(
                f"{counted['graphs'][graph]['gflop']:>{width}.1f}"
                for graph, width in (("encode", 9), ("memorize", 10), ("attend", 9), ("decode", 9))
            )
            lines.append(
                f"  {entry['name']:<24}{entry['parameters'] / 1e6:>9.1f} M  {size:>5}{gflop}"
                f"{counted['memory_bytes_fp16'] / 1000:>8.0f} kB  {entry['licence']}"
            )
    lines += ["", "Embedders at 224 px", f"  {'name':<24}{'parameters':>11}{'GFLOP':>9}  licence"]
    for entry in entries:
        if entry["kind"] == "embedder" and "sizes" in entry:
            (counted,) = entry["sizes"].values()
            lines.append(
                f"  {entry['name']:<24}{entry['parameters'] / 1e6:>9.1f} M"
                f"{counted['gflop']:>9.1f}  {entry['licence']}"
            )
    lines += [
        f"  {'any other':<24}{_SOURCES['other'][0]}; licence: {_SOURCES['other'][1]}",
        "",
        "Weights:",
        *(f"  {family:<8} {source}" for family, (source, _) in _SOURCES.items()),
        "Megabytes of each graph: --list --json.",
    ]
    return "\n".join(lines)
