"""Fixtures for every test."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sqlite3
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Each worker of pytest-xdist on one core, before anything counts cores: threads of several
# workers that wait for each other's cores would take longer than one thread on one core.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})

# Not the repository's root: from there `import runtime` would make a second copy of every module.
sys.path.insert(0, str(Path(__file__).parent))

from support.emulated_gpu import build_emulator
from support.fake_bundle import make_fake_bundle
from support.kernels import build_kernels, build_operators
from support.making import exported_once
from support.records import check_record, dumps_checked

from recallseg.engines.bundle import Bundle
from recallseg.runtime.services import outputs as image_outputs
from recallseg.runtime.volumes import outputs as volume_outputs

# What a user built and named is not what tests build and name.
_OWN = tempfile.TemporaryDirectory(prefix="recallseg-own-")
os.environ["RECALLSEG_STATE"] = f"{_OWN.name}/state"
os.environ["RECALLSEG_CACHE"] = f"{_OWN.name}/cache"


class FileConnection(sqlite3.Connection):
    """Ours: from Python 3.13 on, one that was not closed is an error, unlike highdicom's."""


def _connect(database: Any, *more: Any, connect: Any = sqlite3.connect, **options: Any) -> Any:
    if database != ":memory:":
        options.setdefault("factory", FileConnection)
    return connect(database, *more, **options)


sqlite3.connect = _connect

# How long an example takes says something about the machine, not about the code.
settings.register_profile("recallseg", deadline=None)
settings.load_profile("recallseg")


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage looks through it once more.

    And collections are rare: of what traces networks they took an eighth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_sessionfinish() -> None:
    """What a worker covered is written while it is waited for: 10 s later pytest-xdist kills it."""
    if "coverage" in sys.modules and (covered := sys.modules["coverage"].Coverage.current()):
        covered.save()


@pytest.fixture(autouse=True)
def records_are_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test lets be written is held to docs/schemas."""
    monkeypatch.setattr(json, "dumps", dumps_checked)
    for module in (image_outputs, volume_outputs):

        def replace_file(path: Path, data: bytes, write: Any = module.replace_file) -> None:
            if path.suffix == ".json":
                check_record(json.loads(data))
            write(path, data)

        monkeypatch.setattr(module, "replace_file", replace_file)


@pytest.fixture(scope="session")
def fake_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny bundle for the engine ``fake``; read it, do not change it."""
    return make_fake_bundle(tmp_path_factory.mktemp("bundle") / "fake")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Tiny networks for ONNX Runtime; read it, do not change it."""
    from support.tiny_bundle import make_tiny_bundle

    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def kernels(pytestconfig: pytest.Config) -> Any:
    """The native pixel kernels, built from this source."""
    return build_kernels(pytestconfig)


@pytest.fixture(scope="session")
def operators_file(pytestconfig: pytest.Config) -> Path:
    """The operators for ONNX Runtime, built from this source."""
    return build_operators(pytestconfig)


@pytest.fixture(scope="session")
def emulator(pytestconfig: pytest.Config) -> ctypes.CDLL:
    """The CUDA source of the pixel kernels, compiled for this processor."""
    return build_emulator(pytestconfig)


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it is noted which graphs were proven on the stand-in GPU: once is enough here."""
    return tmp_path_factory.mktemp("proven")


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, proven: Path) -> type[Any]:
    """ONNX Runtime on a stand-in GPU; see :func:`support.fake_onnxruntime.install`."""
    from support.fake_onnxruntime import install

    return install(monkeypatch, proven)


@pytest.fixture(scope="session")
def converted_demo(pytestconfig: pytest.Config) -> Bundle:
    """The demo bundle in every precision of floating point; read it, do not change it."""
    from recallseg.export.converting import convert_bundle
    from recallseg.export.precision import FLOATING

    def make(folder: Path) -> None:
        convert_bundle(Bundle.open("demo"), folder / "demo", FLOATING)

    return Bundle.open(exported_once(pytestconfig, "converted", make) / "demo")


@pytest.fixture
def native_operators(operators_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, where the engine looks for them."""
    monkeypatch.setattr("recallseg.engines.operators._LIBRARY", operators_file)
    return operators_file


@pytest.fixture
def no_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place where they were not built, whatever lies in this working tree."""
    monkeypatch.setattr("recallseg.engines.operators._LIBRARY", tmp_path / "_operators.so")
