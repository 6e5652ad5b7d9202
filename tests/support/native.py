"""Building and running what is linked with librecallseg."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recallseg import Bundle, Library
from support.fake_bundle import make_fake_bundle
from support.pictures import disc

__all__ = [
    "SOURCE",
    "Installed",
    "embedding_environment",
    "make_fake_library",
    "make_library",
    "passed",
    "run",
]

SOURCE = Path(__file__).parents[2]


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command and return it whatever its exit status is."""
    settings = {"capture_output": True, "text": True, "timeout": 560, **options}
    return subprocess.run([str(part) for part in command], check=False, **settings)


def passed(*command: str | Path, **options: Any) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Installed:
    """Install tree, build tree, the checks program, the environment to run it in."""

    prefix: Path
    build: Path
    checks: Path
    env: dict[str, str]

    @property
    def file(self) -> Path:
        (found,) = self.prefix.glob("lib*/**/librecallseg.so")
        return found

    def example(self, language: str) -> Path:
        return self.build / "engines" / "native" / "capi" / f"recallseg_segment_{language}"


def embedding_environment() -> dict[str, str]:
    """Where the embedded interpreter finds this one's packages, and this very recallseg."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env["RECALLSEG_PYTHON"] = sys.executable
    spec = importlib.util.find_spec("recallseg")
    assert spec is not None
    assert spec.origin is not None
    home = Path(spec.origin).parents[1]
    if str(home) in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        env["RECALLSEG_SITE_PACKAGES"] = str(home)
    return env


def make_library(root: Path, bundle: Bundle | str, engine: str) -> Path:
    """Make ``root/library`` with discs and cores."""
    with Library.create(root / "library", bundle, engine=engine) as library:
        for position in (0.2, 0.4, 0.5, 0.6, 0.8):
            picture = disc(position)
            library.add(picture.image, picture.masks, tags={"modality": "MR"}, key=picture.name)
    return root / "library"


def make_fake_library(root: Path) -> Path:
    """Make ``root/library`` for the engine fake, ``root/bundle`` and an empty ``root/scratch``."""
    (root / "scratch").mkdir()
    return make_library(root, make_fake_bundle(root / "bundle"), "fake")
