"""``recallseg export`` and ``convert``: checkpoints in, proven bundle out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from recallseg.commands.common import say_notice
from recallseg.engines.bundle import Bundle
from recallseg.export.bundling import DEFAULT_VARIANTS, VARIANTS, export_bundle
from recallseg.export.checkpoints import load_embedder, load_segmenter
from recallseg.export.converting import CONVERTED, convert_bundle
from recallseg.export.correcting import load_corrector
from recallseg.export.families.listing import networks, networks_table

__all__ = ["convert", "export"]


def export(
    segmenter: Annotated[
        Optional[str],
        typer.Option(
            "--segmenter",
            "--sam2",
            help="SAM 2 or EdgeTAM: Hugging Face folder, Meta's file, 'demo', or random:tiny "
            "and the like.",
            show_default=False,
        ),
    ] = None,
    embedder: Annotated[
        Optional[str],
        typer.Option(
            "--embedder",
            "--dinov2",
            help="Likewise of DINOv2, DINOv3 or any other; random:small and the like.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Optional[Path], typer.Option(help="Folder of the bundle to write.", show_default=False)
    ] = None,
    corrector: Annotated[
        Optional[Path],
        typer.Option(
            help="Safetensors of a prompt encoder and mask decoder for the graph 'correct' alone.",
            show_default="the segmenter's own",
        ),
    ] = None,
    corrector_source: Annotated[
        str, typer.Option(help="Where those come from: pretrained, demo or random.")
    ] = "pretrained",
    corrector_licence: Annotated[str, typer.Option(help="Their licence.")] = "unknown",
    image_size: Annotated[
        Optional[int],
        typer.Option(
            help="Side in pixels of the segmenter's input.",
            show_default="1024, or what fine-tuned weights were trained at",
        ),
    ] = None,
    embed_size: Annotated[
        Optional[int],
        typer.Option(help="Side in pixels of the embedder's input.", show_default="224"),
    ] = None,
    object_pointers: Annotated[
        bool, typer.Option(help="Give memory attention SAM 2's object pointers too.")
    ] = True,
    name: Annotated[
        Optional[str],
        typer.Option(help="What the bundle calls itself.", show_default="the folder's name"),
    ] = None,
    variants: Annotated[
        str,
        typer.Option(help=f"Graph variants to write, comma-separated: {', '.join(VARIANTS)}."),
    ] = ",".join(DEFAULT_VARIANTS),
    pooled: Annotated[
        bool,
        typer.Option(
            "--pooled",
            help="Also write precision 'pooled': memory tokens averaged 2x2, an approximation.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing bundle.")
    ] = False,
    list_: Annotated[
        bool,
        typer.Option("--list", help="List networks, their licences and what they cost instead."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the measured parity, or the list, as JSON.")
    ] = False,
) -> None:
    """Export a bundle and prove it: every graph and the whole are compared with PyTorch."""
    if list_:
        typer.echo(json.dumps(networks(), indent=1) if as_json else networks_table())
        return
    if segmenter is None or embedder is None or output is None:
        raise typer.BadParameter(
            "an export needs --segmenter, --embedder and --output; --list shows the networks."
        )
    progress = Console(stderr=True)
    with progress.status("load checkpoints") as status:
        first = load_segmenter(segmenter, image_size=image_size)
        second = load_embedder(embedder)
        bundle = export_bundle(
            first,
            second,
            output,
            corrector=None
            if corrector is None
            else load_corrector(corrector, source=corrector_source, licence=corrector_licence),
            name=name,
            embed_size=embed_size,
            object_pointers=object_pointers,
            variants=[variant.strip() for variant in variants.split(",")],
            pooled=pooled,
            overwrite=overwrite,
            report=lambda step: status.update(step),
        )
    parity = bundle.manifest["parity"]
    if as_json:
        typer.echo(
            json.dumps({"bundle": str(output), "identity": bundle.identity, "parity": parity})
        )
        return
    worst: dict[str, float] = {}
    for entry in parity:
        worst[entry["graph"]] = max(worst.get(entry["graph"], 0.0), entry["error"])
    typer.echo(repr(bundle))
    for graph, error in worst.items():
        typer.echo(f"  {graph:<11} largest relative error against PyTorch {error:.1e}")
    say_notice(bundle.notice)


def convert(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Folder, or a shipped name.")],
    output: Annotated[Path, typer.Option(help="Folder of the bundle to write.")],
    precisions: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated: {', '.join(CONVERTED)}; 'none' only stores shared weights once."
        ),
    ] = "fp16,mixed",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing bundle.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the measured errors as JSON.")
    ] = False,
) -> None:
    """Add precisions to a bundle, each held to its tolerance on the golden tensors.

    Weights that several graphs have are stored once, those of older bundles too.
    """
    progress = Console(stderr=True)
    with progress.status("convert") as status:
        made = convert_bundle(
            Bundle.open(bundle),
            output,
            [name.strip() for name in precisions.split(",") if precisions != "none"],
            overwrite=overwrite,
            report=lambda step: status.update(step),
        )
    parity = [entry for entry in made.manifest["parity"] if "/" in entry["variant"]]
    if as_json:
        typer.echo(json.dumps({"bundle": str(output), "identity": made.identity, "parity": parity}))
        return
    typer.echo(repr(made))
    for entry in parity:
        typer.echo(
            f"  {entry['variant']:<15} {entry['tensor']:<17} {entry['error']:.1e} of "
            f"{entry['tolerance']:.0e}"
        )
    say_notice(made.notice)
