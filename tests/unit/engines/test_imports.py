"""Packages that may be missing: what is said when one is not there, broken, or too large."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from recallseg.engines.errors import EngineUnavailableError
from recallseg.engines.imports import import_needed


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def load(module: str) -> None:
    import_needed(module, "engine 'x'", "pip install 'recallseg[x]'", "the-package")


def test_what_is_not_there_names_the_extra() -> None:
    for module in ("surely_not_there", "surely_not_there.below", "pathlib2_not_there.a.b"):
        with pytest.raises(EngineUnavailableError, match=r"not installed: pip .*\[x\]'\.$"):
            load(module)


def test_what_is_broken_is_not_called_missing(packages: Path) -> None:
    (packages / "broken_a.py").write_text("raise ImportError('libX.so.3: cannot open')")
    (packages / "broken_b.py").write_text("import surely_not_there_either")
    (packages / "broken_c.so").write_text("no library")
    for module, reason in (("broken_a", "libX.so.3"), ("broken_b", "surely_not_there_either")):
        with pytest.raises(EngineUnavailableError, match=f"cannot be loaded: .*{reason}"):
            load(module)


def test_lack_of_memory_is_not_called_missing(packages: Path) -> None:
    said = "libbig.so: failed to map segment from shared object: Cannot allocate memory"
    (packages / "too_big.py").write_text(f"raise ImportError({said!r})")
    with pytest.raises(MemoryError, match="too little memory to load the-package"):
        load("too_big")


def test_a_real_library_that_does_not_fit_says_so() -> None:
    """The loader's own words, under a limit of the address space."""
    import subprocess

    program = (
        "import resource, recallseg, numpy\n"
        "from recallseg.engines.imports import import_onnxruntime\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + (4 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try:\n"
        "    import_onnxruntime(wanted_by='a test')\n"
        "except MemoryError as error:\n"
        "    print('MemoryError', str(error)[:60])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("MemoryError"), done.stderr
