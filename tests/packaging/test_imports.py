"""Rooms depend on each other one way, and the runtime stays lean."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import recallseg

ROOMS = ("engines", "runtime", "export", "benchmarks")
MAY_IMPORT = {
    "engines": {"engines"},
    "runtime": {"runtime", "engines"},
    "export": {"export", "engines"},
    # PyTorch baselines are made of the export's modules, and only imported when asked for.
    "benchmarks": {"benchmarks", "runtime", "engines", "export"},
}
HEAVY = {"torch", "transformers", "tensorrt", "tensorrt_rtx_bindings", "onnx", "onnxscript"}


def room_folder(room: str) -> Path:
    return Path(__import__(f"recallseg.{room}", fromlist=["x"]).__file__).parent


def imported_modules(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    wrong = [
        f"{file.name}: {name}"
        for file in room_folder(room).rglob("*.py")
        for name in imported_modules(file)
        for other in ROOMS
        if name.split(".")[:2] == ["recallseg", other] and other not in MAY_IMPORT[room]
    ]
    assert not wrong


def test_formats_are_a_leaf() -> None:
    """Files to images and back: no other room of the runtime is needed to read or write one."""
    rooms = {path.name for path in room_folder("runtime").iterdir() if path.is_dir()} - {"formats"}
    wrong = [
        f"{file.name}: {name}"
        for file in (room_folder("runtime") / "formats").rglob("*.py")
        for name in imported_modules(file)
        if name.split(".")[:2] == ["recallseg", "runtime"]
        and name.split(".")[2:3] != []
        and name.split(".")[2] in rooms
    ]
    assert not wrong


@pytest.mark.parametrize("room", ["engines", "runtime"])
def test_no_file_of_the_lean_rooms_names_a_heavy_package(room: str) -> None:
    wrong = [
        f"{file.name}: {name}"
        for file in room_folder(room).rglob("*.py")
        for name in imported_modules(file)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong


def test_the_runtime_never_loads_a_heavy_package() -> None:
    program = (
        "import sys, recallseg, recallseg.cli\n"
        "recallseg.Bundle, recallseg.Library, recallseg.Segmenter, recallseg.Result\n"
        f"print([name for name in {sorted(HEAVY)!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in recallseg.__all__:
        assert getattr(recallseg, name) is not None
    with pytest.raises(AttributeError):
        _ = recallseg.nothing


NIFTI_ONLY = """
import sys
for package in ("pydicom", "highdicom", "gdcm", "pylibjpeg", "openjpeg", "jpeg_ls", "nrrd"):
    sys.modules[package] = None
from pathlib import Path
import nibabel, numpy as np
from typer.testing import CliRunner
from recallseg.cli import app

spine = np.zeros((32, 40, 4), np.int16)
spine[10:20, 10:30, 1:] = 300
for folder in ("one", "many"):
    Path(folder).mkdir()
    for name, values in (("v", spine), ("v.mask", (spine > 0).astype(np.uint8))):
        image = nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 3.0, 1.0]))
        nibabel.save(image, Path(folder) / f"{name}.nii.gz")
for command in (
    "library create lib --bundle demo",
    "library import lib one/v.nii.gz --mask one/v.mask.nii.gz --labels 1=spine",
    "library create lib2 --bundle demo",
    "library import lib2 many --labels 1=spine",
    "segment lib one/v.nii.gz --output out",
):
    done = CliRunner().invoke(app, ["--debug", *command.split()], catch_exceptions=False)
    assert done.exit_code == 0, done.output
assert (Path("out") / "v.mask.nii.gz").is_file()
print("needs nibabel only")
"""


def test_nifti_needs_no_package_for_dicom(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NIFTI_ONLY], cwd=tmp_path, capture_output=True, text=True
    )
    assert "needs nibabel only" in done.stdout, done.stderr
