"""``bench stream``: frames at a display's rate: what is shown, how late, and what is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Annotated, Any, ClassVar, Optional

import typer

from recallseg.benchmarks.facts import bundle_facts, head
from recallseg.benchmarks.machine import Watch, describe_conditions
from recallseg.benchmarks.schema import BundleFacts, Distribution, Head
from recallseg.benchmarks.workload import (
    DESCRIPTION,
    SPARE,
    fill_library,
    query_images,
    structure_names,
)
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
    split_counts,
    split_numbers,
)
from recallseg.engines import defaults
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.runtime.library import Library
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.stream import Frame, Stream

__all__ = ["StreamReport", "StreamRun", "replay", "stream"]

FRAMES = 16  # different ones, over and over


@dataclass(frozen=True)
class StreamRun:
    """One replay: counts as in ``StreamStatistics``.

    Attributes
    ----------
    rate : frames pushed per second; ``memories`` of earlier frames used.
    push : milliseconds that a push takes the caller.
    waited, latency : milliseconds from push to the beginning of the work, and to the result; null
        if no frame was segmented.
    """

    rate: float
    memories: int
    pushed: int
    segmented: int
    dropped: int
    late: int
    failed: int
    push: Distribution
    waited: Distribution | None
    latency: Distribution | None


@dataclass(frozen=True, kw_only=True)
class StreamReport(Head):
    """``bench stream``: a replay for each rate and number of memories.

    Attributes
    ----------
    settings : the options, and how frames were made.
    """

    schema: ClassVar[str] = "recallseg-bench-stream/1"

    bundle: BundleFacts
    settings: Mapping[str, Any]
    runs: tuple[StreamRun, ...]


def replay(
    segmenter: Segmenter,
    *,
    rate: float,
    seconds: float,
    side: int = 512,
    deadline_ms: float | None = None,
) -> StreamRun:
    """Push frames at a rate, for a time, and count.

    Raises
    ------
    InputError
        If rate or time is not positive.
    """
    if not rate > 0 or not seconds > 0:
        raise InputError(f"rate and seconds must be positive, got {rate} and {seconds}.")
    images = query_images(FRAMES, side)
    frames: list[Frame] = []
    pushes: list[float] = []
    segmenter.warm_up()
    with Stream(segmenter, frames.append, deadline_ms=deadline_ms) as live:
        begin = perf_counter()
        for number in range(max(1, round(rate * seconds))):
            sleep(max(0.0, begin + number / rate - perf_counter()))
            start = perf_counter()
            live.push(images[number % FRAMES])
            pushes.append((perf_counter() - start) * 1e3)
        live.drain()
        counts = live.statistics
    done = [frame for frame in frames if frame.result is not None]
    return StreamRun(
        rate,
        segmenter.frames,
        counts.pushed,
        counts.segmented,
        counts.dropped,
        counts.late,
        counts.failed,
        Distribution.of(pushes),
        Distribution.of([frame.waited_ms for frame in done]) if done else None,
        Distribution.of([frame.latency_ms for frame in done]) if done else None,
    )


def stream(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Folder of a bundle, or a name.")],
    output: Annotated[Path, typer.Option(help="Folder for stream.json.")],
    rate: Annotated[str, typer.Option(help="Frames per second; several.")] = "20,30",
    seconds: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Length of each replay.")
    ] = 10.0,
    k: Annotated[int, typer.Option("--k", min=1, help="Exemplars to recall.")] = 1,
    structures: Annotated[int, typer.Option(min=1, help="How many to ask for.")] = 1,
    memories: Annotated[str, typer.Option(help="Memories of earlier frames; several.")] = "0,2",
    deadline: Annotated[
        Optional[float],
        typer.Option(help="Milliseconds from push to result.", show_default="none"),
    ] = None,
    query_size: Annotated[int, typer.Option("--query-size", min=16, help="Side in pixels.")] = 512,
    engine: EngineOption = defaults.ENGINE,
    precision: PrecisionOption = defaults.PRECISION,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replay live frames: latency from push to result, and how many frames are dropped."""
    rates = parsed(split_numbers, rate, "--rate")
    rings = parsed(split_counts, memories, "--memories")
    opened = Bundle.open(bundle)
    check_output_folder(output)
    say_notice(opened.notice)
    runs: list[StreamRun] = []
    conditions, watch = describe_conditions(), Watch()
    with (
        TemporaryDirectory(prefix="recallseg-bench-") as folder,
        progress_bar("Replaying", len(rings) * len(rates)) as step,
    ):
        path = Path(folder, "library")
        fill_library(
            path, opened, exemplars=k + SPARE, structures=structures, side=query_size,
            engine=engine, precision=precision, threads=threads,
        )  # fmt: skip
        for ring in rings:
            with Library.open(path) as library:
                segmenter = Segmenter(
                    library,
                    k=k,
                    structures=structure_names(structures),
                    engine=engine,
                    precision=precision,
                    threads=threads,
                    frames=ring,
                )
                for frames in rates:
                    runs.append(
                        replay(
                            segmenter,
                            rate=frames,
                            seconds=seconds,
                            side=query_size,
                            deadline_ms=deadline,
                        )
                    )
                    step(f"{frames} frames/s, {ring} memories")
    conditions |= watch.stop()
    report = StreamReport(
        **head(conditions),
        bundle=bundle_facts(opened),
        settings={
            "k": k, "structures": structures, "query_size": query_size, "deadline_ms": deadline,
            "engine": engine, "precision": precision, "threads": threads, "frames_are": DESCRIPTION,
        },
        runs=tuple(runs),
    )  # fmt: skip
    report.save(output / "stream.json")
    if as_json:
        emit_json(report.to_json())
        return
    for run in runs:
        told = "none segmented"
        if run.latency is not None:
            told = f"p50 {run.latency.p50:.1f}, p99 {run.latency.p99:.1f} ms from push to result"
        typer.echo(
            f"{run.rate:g} frames/s, {run.memories} memories: {run.segmented} of {run.pushed} "
            f"segmented, {run.dropped} dropped, {run.late} late; {told}; a push takes p99 "
            f"{run.push.p99:.2f} ms"
        )
    for remark in report.remarks:
        note(remark)
    note(f"wrote {output / 'stream.json'}")
