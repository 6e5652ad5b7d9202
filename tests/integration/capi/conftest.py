"""librecallseg, built and installed as a device project would; a library for the fake engine."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
from support.kernels import NATIVE
from support.making import build_folder, once
from support.native import (
    SOURCE,
    Installed,
    embedding_environment,
    make_fake_library,
    make_library,
    passed,
)

from recallseg import Bundle
from recallseg.runtime.library.own import remember_bundle

HEADER = Path(sysconfig.get_path("include"), "Python.h")
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def capi(pytestconfig: pytest.Config) -> Installed:
    missing = [tool for tool in ("cmake", "cc", "c++") if shutil.which(tool) is None]
    if not HEADER.is_file():
        missing.append("Python's headers")
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        missing.append("libpython as a shared library")
    if missing:
        pytest.skip(f"not on this machine: {', '.join(missing)}")
    strict = "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"

    def make(root: Path) -> None:
        build, prefix, checks = root / "build", root / "prefix", root / "checks"
        passed(
            *("cmake", "-S", SOURCE, "-B", build, f"-DCMAKE_INSTALL_PREFIX={prefix}", strict),
            *(f"-DPython3_EXECUTABLE={sys.executable}", "-DRECALLSEG_BUILD_CAPI=ON"),
        )
        passed("cmake", "--build", build, "--parallel", "2")
        passed("cmake", "--install", build)
        # Against the install tree, by find_package.
        passed("cmake", "-S", HERE, "-B", checks, f"-DCMAKE_PREFIX_PATH={prefix}", strict)
        passed("cmake", "--build", checks, "--parallel", "2")

    sources = (*NATIVE, HERE, "tests/fixtures/capi")
    root = once(build_folder(pytestconfig, "capi", sources), make)
    return Installed(
        root / "prefix", root / "build", root / "checks" / "checks", embedding_environment()
    )


@pytest.fixture(scope="session")
def made_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_library(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def fake_library(made_library: Path) -> Path:
    """A library of discs and cores; read it, do not change it."""
    # Other tests have this bundle in places of their own, and only so many are remembered.
    bundle = Bundle.open(made_library.parent / "bundle")
    remember_bundle(bundle.identity, bundle.path)
    return made_library


@pytest.fixture(scope="session")
def real_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, made with the demo model and ONNX Runtime."""
    return make_library(tmp_path_factory.mktemp("real"), "demo", "onnxruntime-cpu")
