"""Nothing leaves the device, and nothing is written unasked: a process is traced while it works."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tracing import Trace, trace

import recallseg
from recallseg.engines import imports

SOURCE = Path(__file__).parents[2]
SEGMENTS_ONE = """
import sys, time
start = time.monotonic()
import numpy as np
from recallseg import Bundle, Library, Segmenter
mask = np.zeros((90, 120), bool)
mask[30:60, 40:90] = True
image = np.random.default_rng(0).normal(100, 5, mask.shape) + 60 * mask
with Library.create("library", Bundle.open("demo"), threads=1) as library:
    for shift in (0, 5, 10, 15):
        library.add(np.roll(image, shift, 1), {"a": np.roll(mask, shift, 1)})
    result = Segmenter(library, k=4, threads=1).segment(np.roll(image, 7, 1))
import onnxruntime
print(onnxruntime.__version__, int(result.masks["a"].sum()))
time.sleep(max(0.0, float(sys.argv[1]) + start - time.monotonic()))
"""
# 1.32 looks for the collector 15 to 25 seconds after its import; it reports since 1.29.
SECONDS = "30"
ALLOWED = (
    *("1.20.1", "1.21.1", "1.22.1", "1.23.2", "1.24.4", "1.25.1", "1.26.0", "1.27.0", "1.28.0"),
    *("1.29.0", "1.30.0", "1.31.1", "1.32.0"),
)


def traced(tmp_path: Path, *command: str | Path, packages: Path | None = None) -> Trace:
    """Trace a command in ``work``, with a HOME of its own beside it."""
    for name in ("work", "home"):
        (tmp_path / name).mkdir(exist_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    path = [str(packages)] if packages else []
    env = {
        **kept,
        "PYTHONPATH": os.pathsep.join([*path, *filter(None, [kept.get("PYTHONPATH")])]),
        "HOME": str(tmp_path / "home"),
        "RECALLSEG_STATE": str(tmp_path / "work" / "state"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return trace(command, tmp_path / "work", env, tmp_path / f"logs{len(list(tmp_path.iterdir()))}")


def check(found: Trace, tmp_path: Path) -> None:
    assert found.sockets == []
    assert found.written_outside(tmp_path / "work") == []
    assert list((tmp_path / "home").iterdir()) == []


def test_a_process_that_segments_opens_no_socket_and_writes_only_what_was_named(
    tmp_path: Path,
) -> None:
    found = traced(tmp_path, sys.executable, "-c", SEGMENTS_ONE, SECONDS)
    assert int(found.stdout.split()[1]) > 0
    assert any("library" in path for path in found.written), "the trace sees nothing"
    check(found, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("version", ALLOWED)
def test_the_same_with_every_onnxruntime_that_is_allowed(version: str, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"),
            *(packages, f"onnxruntime=={version}"),
        ],
        check=True,
    )
    found = traced(tmp_path, sys.executable, "-c", SEGMENTS_ONE, SECONDS, packages=packages)
    assert found.stdout.split()[0] == version
    check(found, tmp_path)


def test_the_command_line_writes_only_what_was_named(tmp_path: Path) -> None:
    for command in (
        ("library", "create", "library", "--bundle", "demo"),
        ("library", "list", "library"),
        ("doctor",),
        ("doctor", "--budget"),
    ):
        check(traced(tmp_path, sys.executable, "-m", "recallseg", *command), tmp_path)


def test_a_trace_sees_sockets_and_files(tmp_path: Path) -> None:
    program = (
        "import os, socket, pathlib\n"
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()\n"
        "os.mkdir('asked')\n"
        "(pathlib.Path.home() / 'unasked').write_text('x')\n"
        "os.rename(pathlib.Path.home() / 'unasked', pathlib.Path.home() / 'moved')\n"
    )
    found = traced(tmp_path, sys.executable, "-c", program)
    home = tmp_path / "home"
    assert len(found.sockets) == 1
    assert found.written_outside(tmp_path / "work") == [str(home / "moved"), str(home / "unasked")]


def test_onnxruntime_has_one_door() -> None:
    door = Path(imports.__file__)
    rooms = [
        Path(__import__(f"recallseg.{name}", fromlist=["x"]).__file__).parent
        for name in ("engines", "runtime", "export", "benchmarks", "commands")
    ]
    files = [f for room in rooms for f in room.rglob("*.py")]
    files += list(Path(recallseg.__file__).parent.glob("*.py"))
    wrong = []
    for file in files:
        if file.samefile(door):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            named = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and node.level == 0
                else [str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)]
                if isinstance(node, ast.Call)
                and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
                else []
            )
            wrong += [f"{file}:{node.lineno}" for n in named if n.split(".")[0] == "onnxruntime"]
    assert wrong == []


@pytest.mark.parametrize("value", [None, "0", "", "1", "true"])
def test_telemetry_is_off_for_whoever_imports_onnxruntime_after_us(value: str | None) -> None:
    env = {name: v for name, v in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    if value is not None:
        env["ORT_DISABLE_TELEMETRY"] = value
    program = "import recallseg, subprocess; subprocess.run(['printenv', 'ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == (value if value == "true" else "1")


@pytest.mark.parametrize("off", [False, True])
def test_whoever_imported_it_before_is_warned_once(off: bool) -> None:
    env = {name: v for name, v in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    program = (
        "import sys, types, warnings\n"
        "sys.modules['onnxruntime'] = types.ModuleType('onnxruntime')\n"
        "import recallseg\n"
        "from recallseg.engines.imports import import_onnxruntime\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2): import_onnxruntime(wanted_by='a test')\n"
        "print(*(w.message for w in caught), sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=env | ({"ORT_DISABLE_TELEMETRY": "1"} if off else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.split("\n")[:-1]
    assert len(lines) == 1
    assert (lines[0] == "") if off else ("Import recallseg first" in lines[0])
