"""What C is told: statuses, and cures that can be applied in C."""

from __future__ import annotations

import ast
import logging
import re
import sys
from pathlib import Path

import pytest

import recallseg
from recallseg.engines import errors
from recallseg.runtime.services import c_interface
from recallseg.runtime.services.c_errors import STATUS, in_c, status_of

PYTHONS = re.compile(
    r"\bmode=|=['\"(]|numpy\.|Segmenter\(|Library\.|Stream\(|\bNone\b|\b(?:True|False)\b"
)
# What only Python objects can have wrong: C hands over memory of a known type and layout.
NOT_FROM_C = re.compile(
    r"must be a numpy array|must have an integer or floating dtype|a frame must be|numpy.moveaxis"
    r"|out (?:must have|lies)|an embedding of this library|of a label map|C-contiguous"
)


def messages() -> dict[str, str]:
    """Every text that the rooms behind the C ABI raise, without what is filled in."""
    root = Path(recallseg.runtime.__file__).parent
    files = [root / "checks.py", root / "services" / "stream.py"]
    for room in ("library", "segmenting", "model"):
        files += sorted((root / room).rglob("*.py"))
    files += sorted(root.parent.joinpath("engines").glob("*.py"))
    found = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None:
                parts = [
                    str(part.value)
                    for part in ast.walk(node.exc)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ]
                found[f"{file.name}:{node.lineno}"] = "".join(parts)
    return found


def test_no_message_for_c_names_a_cure_in_python() -> None:
    all_of_them = messages()
    assert len(all_of_them) > 150
    wrong = {
        where: text
        for where, text in all_of_them.items()
        if PYTHONS.search(in_c(text)) and not NOT_FROM_C.search(text)
    }
    assert wrong == {}


def test_a_cure_is_that_of_the_header() -> None:
    header = Path(__file__).parents[4] / "engines/native/capi/include/recallseg.h"
    declared = header.read_text()
    said = status_of(errors.LibraryWriteError("it is open for reading. Open it with mode='write'."))
    assert said == (
        STATUS[errors.LibraryWriteError],
        "it is open for reading. Open it with recallseg_library_options.writable = 1.",
    )
    _, text = status_of(errors.InputError("leave the mask out and pass absent=('core',)."))
    assert "name 'core' in recallseg_exemplar.absent" in text
    for struct, member in re.findall(r"(recallseg_\w+)\.(\w+)", said[1] + text):
        body = declared[declared.index(f"typedef struct {struct} {{") :]
        assert re.search(rf"\b{member};", body[: body.index("}")])


def test_a_package_that_is_missing_is_named_with_the_interpreter() -> None:
    status, text = status_of(ModuleNotFoundError("No module named 'scipy'", name="scipy.ndimage"))
    assert status == 6
    assert "'scipy' is not installed" in text
    assert sys.executable in text


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("too little memory to load onnxruntime"),
        ImportError("libx.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_lack_of_memory_has_one_status(error: BaseException) -> None:
    status, text = status_of(error)
    assert status == 19
    assert text


def test_lines_that_a_host_cannot_take_are_counted(capfd: pytest.CaptureFixture[str]) -> None:
    """As for want of memory: its stderr is its own, and a query goes on."""
    told: list[str] = []
    short = [True]

    def emit(level: int, name: str, message: str) -> None:
        if short[0]:
            raise MemoryError
        told.append(message)

    handler = c_interface._Handler(emit)
    log = logging.Logger("recallseg.embedding")
    log.addHandler(handler)
    log.warning("one")
    log.warning("two")
    short[0] = False
    log.warning("three")
    log.warning("four")
    assert told == ["2 lines could not be passed on: too little memory", "three", "four"]
    assert capfd.readouterr().err == ""
