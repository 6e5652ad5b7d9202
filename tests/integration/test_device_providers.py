"""The real providers: on a stub of the driver, and on the GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

STUB = Path(__file__).parents[1] / "support" / "cuda_stub" / "stub.cpp"
PROVIDERS = ("cuda-bindings", "pycuda")
PACKAGES = {"cuda-bindings": "cuda", "pycuda": "pycuda"}


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libcuda.so.1."""
    folder = tmp_path_factory.mktemp("cuda-stub")
    more = folder / "more.cpp"
    more.write_text(_refusals())
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    library = folder / "libcuda.so.1"
    subprocess.run(
        [*command, "-o", library, STUB, more, "-Wl,-soname,libcuda.so.1", "-ldl"], check=True
    )
    return folder


def _refusals() -> str:
    """What PyCUDA is linked against beside what the stub has: functions that are not supported."""
    found = find_spec("pycuda")
    if found is None or not found.submodule_search_locations:
        return ""
    [library] = Path(found.submodule_search_locations[0]).glob("_driver*.so")
    names = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout.split()
    had = STUB.read_text()
    wanted = sorted(n for n in names if n.startswith("cu") and f" {n}(" not in had)
    return "".join(f'extern "C" int {name}() {{ return 801; }}\n' for name in wanted)


def run(provider: str, stub: Path | None, **more: str) -> subprocess.CompletedProcess[str]:
    if find_spec(PACKAGES[provider]) is None:
        pytest.skip(f"{provider} is not installed")
    paths = [str(STUB.parents[2]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}
    if stub is not None:
        environment["LD_LIBRARY_PATH"] = str(stub)
    return subprocess.run(
        [sys.executable, "-m", "support.device_checks", provider],
        capture_output=True,
        text=True,
        env=environment,
    )


def _ours(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The error that ended the program; PyCUDA has its say at the end, too."""
    name = "recallseg.errors."
    return [line for line in done.stderr.splitlines() if line.startswith(name)]


def passed(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    assert "context stack" not in done.stderr  # what PyCUDA says before it aborts
    assert "Traceback" not in done.stderr  # of a thread, or at exit
    found: list[str] = json.loads(done.stdout.splitlines()[-1])["passed"]
    return found


@pytest.mark.parametrize("provider", PROVIDERS)
def test_on_the_stub(provider: str, stub: Path) -> None:
    assert len(passed(run(provider, stub))) == 9


@pytest.mark.gpu
@pytest.mark.parametrize("provider", PROVIDERS)
def test_on_the_gpu(provider: str) -> None:
    assert len(passed(run(provider, None))) == 9


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("told", "kind", "words"),
    [
        ("cuInit:100:0", "EngineUnavailableError", "no NVIDIA GPU"),
        ("cuInit:803:0", "EngineUnavailableError", "restart the machine"),
        ("cuMemAlloc:2:0", "DeviceMemoryError", "smaller k"),
        ("cuMemcpyHtoDAsync:700:0", "DeviceLostError", "onnxruntime-cpu"),
        ("cuStreamSynchronize:719:0", "DeviceLostError", "onnxruntime-cpu"),
    ],
)
def test_what_the_driver_says_becomes_one_of_our_errors(
    provider: str, stub: Path, told: str, kind: str, words: str
) -> None:
    done = run(provider, stub, RECALLSEG_STUB_FAIL=told)
    [said] = _ours(done)
    assert kind in said
    assert words in said


@pytest.mark.parametrize("provider", PROVIDERS)
def test_an_old_driver_and_no_gpu(provider: str, stub: Path) -> None:
    old = run(provider, stub, RECALLSEG_STUB_VERSION="10020")
    assert "too old" in old.stderr
    none = run(provider, stub, RECALLSEG_STUB_DEVICES="0")
    assert "EngineUnavailableError" in none.stderr


@pytest.mark.parametrize("provider", PROVIDERS)
def test_without_a_driver_that_is_said(provider: str, tmp_path: Path) -> None:
    done = run(provider, tmp_path)
    if done.returncode == 0:
        pytest.skip("there is a GPU")
    [said] = _ours(done)
    assert "EngineUnavailableError" in said
    assert "onnxruntime-cpu" in said
