"""``recallseg export-triton``: a bundle for sites that run NVIDIA's Triton server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recallseg.commands.common import say, say_notice
from recallseg.engines.bundle import Bundle
from recallseg.export.triton.repository import export_triton

__all__ = ["export_triton_command"]


def export_triton_command(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Folder, or a shipped name.")],
    output: Annotated[Path, typer.Option(help="Folder of the model repository to write.")],
    engine: Annotated[
        str, typer.Option("--engine", help="onnxruntime, or tensorrt (verified plans).")
    ] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="Precision of the graphs.")] = "fp32",
    device: Annotated[str, typer.Option(help="Where the models run: gpu or cpu.")] = "gpu",
    prefix: Annotated[str, typer.Option(help="Of the models' names.")] = "recallseg",
) -> None:
    """Write a Triton model repository: the graphs, and models that segment and remember by them."""
    opened = Bundle.open(bundle)
    folder = export_triton(
        opened, output, engine=engine, precision=precision, device=device, prefix=prefix
    )
    say(str(folder))
    for path in sorted(folder.iterdir()):
        say(f"  {path.name}")
    quiet = "ORT_DISABLE_TELEMETRY=1 " if engine == "onnxruntime" else ""
    say(f"start it with: {quiet}tritonserver --model-repository={folder.absolute()}")
    say_notice(opened.notice)
