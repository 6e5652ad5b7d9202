"""The repository's tests that want a GPU, a file at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from recallseg.engines.errors import EngineUnavailableError, InputError

__all__ = ["files_of", "run_tests"]

MARK = "mark.gpu"
FIRST = ("test_device_queries.py", "test_device_providers.py")
"""What says whether queries are right comes before single kernels and plans."""


def files_of(folder: Path) -> list[Path]:
    """Return the files of tests that bear the mark, those of whole queries first."""
    found = [file for file in folder.rglob("test_*.py") if MARK in file.read_text(encoding="utf-8")]
    order = {name: place for place, name in enumerate(FIRST)}
    return sorted(found, key=lambda file: (order.get(file.name, len(order)), str(file)))


def run_tests(file: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """Run what is marked gpu in a file; return what passed, failed and was skipped, and why.

    Parameters
    ----------
    file : of tests, in ``folder``; its parent has pytest's settings.
    seconds : for all of them; those that ended until then are told.

    Raises
    ------
    EngineUnavailableError
        If there is no such file.
    InputError
        If pytest left no report.
    """
    if not file.is_file():
        raise EngineUnavailableError(f"there are no tests at {file}.")
    report = folder / f".gpu-tests-{file.stem}.xml"
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"),
        *(f"--session-timeout={seconds:.0f}", f"--junitxml={report}", str(file)),
    ]
    try:
        done = subprocess.run(  # noqa: S603  (this interpreter, pytest)
            command, cwd=folder.parent, capture_output=True, text=True, timeout=seconds + 30,
            check=False,
        )  # fmt: skip
        root = ElementTree.parse(report).getroot()  # noqa: S314  (written by pytest just now)
    except (OSError, subprocess.SubprocessError, ElementTree.ParseError) as error:
        raise InputError(f"the tests marked gpu left no report: {error}.") from error
    finally:
        report.unlink(missing_ok=True)
    states: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in root.iter("testcase"):
        marks = {child.tag: child.get("message", "") for child in case}
        state = "failed" if {"failure", "error"} & marks.keys() else "passed"
        state = "skipped" if "skipped" in marks else state
        why = next(iter(marks.values()), "")
        states[state].append(
            f"{case.get('classname')}.{case.get('name')}" + (f": {why}" if why else "")
        )
    return {"status": done.returncode, **states}
