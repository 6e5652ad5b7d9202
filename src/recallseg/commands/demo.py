"""``recallseg demo``: annotate 16 real MR slices, segment those between them, leave a page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from recallseg.commands.common import (
    EngineOption,
    JsonOption,
    PrecisionOption,
    ThreadsOption,
    check_output_folder,
    note,
    progress_bar,
    say_notice,
)
from recallseg.commands.evaluate import finish
from recallseg.engines import defaults
from recallseg.engines.errors import InputError

__all__ = ["demo"]

MARKER = "demo.json"


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the page and the library.")] = Path(
        "demo-output"
    ),
    k: Annotated[int, typer.Option("--k", min=1, max=15, help="Exemplars to recall.")] = 8,
    bundle: Annotated[
        str, typer.Option(help="Folder of a bundle, or the name of a shipped one.")
    ] = "demo",
    engine: EngineOption = defaults.ENGINE,
    precision: PrecisionOption = defaults.PRECISION,
    threads: ThreadsOption = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate/--no-calibrate", help="Leave one out, for the quality flag."),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Annotate 16 slices of a real MR brain, segment those midway between them, compare."""
    from recallseg.engines.bundle import Bundle
    from recallseg.runtime.checks import check_count
    from recallseg.runtime.library import Library
    from recallseg.runtime.model.model import Model
    from recallseg.runtime.reports.demo import SPACING, STRUCTURES, fill_library, load_slices
    from recallseg.runtime.reports.evaluation import evaluate
    from recallseg.runtime.segmenting.segmenter import Segmenter

    opened = Bundle.open(bundle)
    check_count(k, "k", 1, opened.geometry.max_k)
    check_output_folder(output)
    slices = load_slices()
    note(
        f"MNI152 T1 template: {len(slices.exemplars)} axial slices annotated, "
        f"{slices.gap:.1f} mm apart; {len(slices.queries)} midway between them to segment"
    )
    # What is there of an earlier demo goes when everything that this one needs is.
    with (
        Model.open(opened, engine=engine, precision=precision, threads=threads) as model,
        Library.create(_fresh_library_folder(output), opened, model=model) as library,
    ):
        say_notice(opened.notice)
        with progress_bar("Annotating", len(slices.exemplars)) as step:
            fill_library(library, slices, step)

        def make(k: int) -> Segmenter:
            return Segmenter(library, k=k, structures=STRUCTURES, model=model)

        if calibrate:
            with progress_bar("Calibrating", len(library)) as step:
                make(k).calibrate(lambda done, total: step(""))
        with progress_bar("Segmenting", len(slices.queries)) as step:
            evaluation = evaluate(
                library, slices.queries, STRUCTURES, [k], make, spacing=SPACING, progress=step
            )
        title = "Demo: MNI152 brain, slice by slice"
        written = evaluation.write(output, library, title=title, threads=threads)
        finish(evaluation, written, output, as_json=as_json)


def _fresh_library_folder(output: Path) -> Path:
    """Return an empty place for the library: an earlier demo's is removed, others are refused."""
    output.mkdir(parents=True, exist_ok=True)
    folder, marker = output / "library", output / MARKER
    if folder.exists():
        if not marker.is_file():
            raise InputError(
                f"{folder} exists and was not made by the demo. Choose another --output."
            )
        shutil.rmtree(folder)
    marker.write_text(json.dumps({"made_by": "recallseg demo"}), encoding="utf-8")
    return folder
