"""Reads damaged files in a process of its own, and says how each of them ended.

A reader may return or raise InputError. Anything else is a finding: another exception, a process
that died, one that did not answer in time, or more memory than it was given.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import resource
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

from fuzz import artefacts
from fuzz.mutations import damage, good_files, good_series
from recallseg.engines.errors import InputError

__all__ = ["Findings", "damaged_file", "read", "run_campaign"]

PIXELS = 2**26
"""Bytes of pixels that a file may declare here (in the product: ``limits.max_bytes``)."""
ROOM = 2**29
"""Bytes that a process may take beside what it has once everything is imported."""


@dataclass
class Findings:
    """How often each thing happened (``read``, ``refused``, or a finding), by format."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    peak_bytes: int = 0
    slowest: tuple[float, str] = (0.0, "")  # in seconds of the processor

    def add(self, kind: str, index: int, name: str, outcome: str, why: str = "") -> None:
        """Count one file."""
        self.counts.setdefault(kind, Counter())[outcome] += 1
        if outcome not in ("read", "refused"):
            self.findings.append(f"{kind} {index} ({name}): {outcome} {why}".rstrip())


def damaged_file(
    files: dict[str, list[tuple[str, bytes]]], kind: str, index: int, seed: int
) -> tuple[str, bytes]:
    """Return name and content of one file; the same for the same arguments, always."""
    rng = random.Random(f"{seed} {kind} {index}")
    name, data = files[kind][index % len(files[kind])]
    return name, damage(kind, name, data, rng)


def read(path: Path) -> None:
    """Read a file with whatever reads its like."""
    from recallseg.runtime.formats.dicom_seg_reading import read_segmentation
    from recallseg.runtime.formats.nrrd import read_seg_nrrd
    from recallseg.runtime.formats.reading import read_volume

    if path.name.endswith(".seg.nrrd"):
        read_seg_nrrd(path)
    elif path.name.startswith("seg-"):
        read_segmentation(path, read_volume(path.parent / "series"))
    else:
        read_volume(path, time=1)


def run_campaign(
    kind: str,
    count: int,
    seed: int,
    found: Findings,
    *,
    first: int = 0,
    reader: str = "fuzz.campaign:read",
    seconds: float = 20.0,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Read ``count`` damaged files of a kind, and add what happened to ``found``.

    Parameters
    ----------
    first : number of the first; each is the same whatever was read before.
    reader : what reads, as ``module:function`` taking a path.
    seconds : for one file.
    """
    names = [kind] if kind in artefacts.KINDS else [name for name, _ in good_files()[kind]]
    context = multiprocessing.get_context("spawn")
    index, end = first, first + count
    while index < end:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, kind, index, end, seed, reader))
        process.start()
        theirs.close()
        ready = ours.poll(900) and ours.recv()  # imports take what they take
        while ready and index < end:
            name = names[index % len(names)]
            if not ours.poll(seconds):
                found.add(kind, index, name, "hang", f"(over {seconds:g} s)")
                index += 1
                break
            try:
                outcome, why, peak, spent = ours.recv()
            except EOFError:
                process.join(10)
                found.add(kind, index, name, "crash", f"(exit status {process.exitcode})")
                index += 1
                break
            found.add(kind, index, name, outcome, why)
            found.peak_bytes = max(found.peak_bytes, peak)
            found.slowest = max(found.slowest, (round(spent, 3), f"{kind} {index} ({name})"))
            index += 1
            progress(f"{kind} {index}")
        process.kill()
        process.join()
        if not ready:
            raise RuntimeError("the process that reads could not be started.")


def _work(pipe: Connection, kind: str, first: int, end: int, seed: int, reader: str) -> None:
    warnings.simplefilter("ignore")
    os.environ["RECALLSEG_MAX_BYTES"] = str(PIXELS)
    module, _, function = reader.partition(":")
    target = getattr(importlib.import_module(module), function)
    received = kind in artefacts.KINDS
    files = {} if received else good_files()  # imports what readers import
    with TemporaryDirectory(prefix="recallseg-fuzz-") as place:
        folder = Path(place)
        if received:
            target = artefacts.use
            artefacts.prepare(folder)
            artefacts.warm(kind, folder)
        if kind == "segmentation":
            good_series(folder / "series")
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
        pipe.send(True)
        for index in range(first, end):
            if received:
                path = artefacts.make(kind, index, seed, folder)
            else:
                name, data = damaged_file(files, kind, index, seed)
                path = folder / name
                path.write_bytes(data)
            outcome, why, start = "read", "", process_time()
            try:
                target(path)
            except InputError:
                outcome = "refused"
            except MemoryError:
                outcome = "memory"
            except BaseException as error:
                outcome, why = "exception", f"{type(error).__name__}: {error}"[:300]
            spent = process_time() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            pipe.send((outcome, why, peak, spent))
