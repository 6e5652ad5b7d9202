"""The locked requirements of a device: complete, hashed, and in step with pyproject.toml."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SOURCE = Path(__file__).parents[2]
LOCKED = SOURCE / "requirements"
SETS = {"cpu": {"cpu"}, "cpu-medical": {"cpu", "medical"}}
MACHINES = ("x86_64", "aarch64")
OWN = "recallseg (pyproject.toml)"
PROJECT = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
PYTHONS = tuple(
    found[1]
    for text in PROJECT["classifiers"]
    if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", text))
)


def file_name(extras: str, python: str, machine: str) -> str:
    return f"{extras}-{python}-{machine}.txt"


ALL = [(extras, python, machine) for extras in SETS for python in PYTHONS for machine in MACHINES]


class Pins:
    """What a file says: versions and hashes by name, and which names are asked for by whom."""

    def __init__(self, text: str) -> None:
        self.versions: dict[str, Version] = {}
        self.hashes: dict[str, list[str]] = {}
        self.asked_by: dict[str, set[str]] = {}
        self.options: list[str] = []
        name = ""
        for line in text.splitlines():
            words = line.strip().rstrip("\\").strip()
            if found := re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", words):
                name = canonicalize_name(found[1])
                assert name not in self.versions, f"{name} twice"
                self.versions[name] = Version(found[2])
                self.hashes[name], self.asked_by[name] = [], set()
            elif found := re.fullmatch(r"--hash=sha256:([0-9a-f]{64})", words):
                self.hashes[name].append(found[1])
            elif found := re.fullmatch(r"#\s+(?:via )?(\S.*)", words):
                if found[1] != "via":
                    self.asked_by[name].add(found[1])
            elif words.startswith("--"):
                self.options.append(words)
            elif words:
                raise AssertionError(f"neither pin nor hash: {line!r}")


def asked_for(project: dict[str, Any], extras: set[str], python: str, machine: str) -> list[Any]:
    """Return what pyproject.toml asks for there, markers applied."""
    place = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "platform_machine": machine,
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "extra": "",
    }
    texts = [*project["dependencies"]]
    for extra in sorted(extras):
        texts += project["optional-dependencies"][extra]
    asked = [Requirement(text) for text in texts]
    return [one for one in asked if one.marker is None or one.marker.evaluate(place)]


def problems(
    text: str, project: dict[str, Any], extras: set[str], python: str, machine: str
) -> list[str]:
    """Return what is wrong with a file's text."""
    pins = Pins(text)
    asked = asked_for(project, extras, python, machine)
    names = {canonicalize_name(one.name) for one in asked}
    found = []
    for one in asked:
        version = pins.versions.get(canonicalize_name(one.name))
        if version is None:
            found.append(f"{one.name} is missing")
        elif version not in one.specifier:
            found.append(f"{one.name} is {version}, asked for is {one.specifier}")
    for name, by in pins.asked_by.items():
        if not pins.hashes[name]:
            found.append(f"{name} has no hash")
        if (OWN in by) != (name in names):
            found.append(f"{name}: pyproject.toml {'does not ask' if OWN in by else 'asks'} for it")
        if not by or not by <= {OWN, *pins.versions}:
            found.append(f"{name} is asked for by {by}, which is not here")
    if pins.options != ["--only-binary :all:"]:
        found.append(f"options {pins.options}")
    return found


def test_there_is_a_file_for_each_python_and_machine() -> None:
    assert PYTHONS == ("3.10", "3.11", "3.12", "3.13")
    assert {path.name for path in LOCKED.iterdir()} == {file_name(*one) for one in ALL}


@pytest.mark.parametrize(("extras", "python", "machine"), ALL)
def test_a_file_is_in_step_with_the_project(extras: str, python: str, machine: str) -> None:
    text = (LOCKED / file_name(extras, python, machine)).read_text()
    assert problems(text, PROJECT, SETS[extras], python, machine) == []
    assert "://" not in text  # no index or folder of whoever made it


def test_files_out_of_step_are_found() -> None:
    text = (LOCKED / "cpu-3.12-x86_64.txt").read_text()
    place = ({"cpu"}, "3.12", "x86_64")

    def told(text: str = text, extra: str = "", without: str = "", **asked: Any) -> str:
        project = json.loads(json.dumps(PROJECT))
        kept = [one for one in project["dependencies"] if not without or without not in one]
        project["dependencies"] = kept + [extra] * bool(extra)
        return "; ".join(problems(text, project, *place))

    assert "six is missing" in told(extra="six>=1")
    assert told(extra="six>=1; python_version < '3.12'") == ""
    assert told(extra="six>=1; platform_machine == 'aarch64'") == ""
    assert "numpy is" in told(extra="numpy>=99")
    assert "rich: pyproject.toml does not ask for it" in told(without="rich")
    first = Pins(text).hashes["rich"]
    bare = "\n".join(line for line in text.splitlines() if not any(h in line for h in first))
    assert "rich has no hash" in told(bare)
    assert "options" in told(text.replace("--only-binary :all:\n", ""))


def fake_wheel(folder: Path, name: str, version: Version) -> Path:
    """Write a wheel with nothing in it."""
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    files = {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    record = ""
    for file, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()
        record += f"{file},sha256={digest.rstrip('=')},{len(text)}\n"
    files[f"{stem}.dist-info/RECORD"] = f"{record}{stem}.dist-info/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return path


def pip(folder: Path, file: Path) -> subprocess.CompletedProcess[str]:
    arguments = ["--dry-run", "--require-hashes", "--no-deps", "--no-index", "--ignore-installed"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", *arguments, "--find-links", folder, "-r", file],
        capture_output=True,
        text=True,
        env={**environment, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )


@pytest.mark.parametrize("extras", SETS)
def test_pip_takes_no_other_file_for_a_pin(extras: str, tmp_path: Path) -> None:
    """Stand-ins of every package, which pip reads the whole file for and must refuse."""
    text = (LOCKED / file_name(extras, "3.12", "x86_64")).read_text()
    wheels = {name: fake_wheel(tmp_path, name, v) for name, v in Pins(text).versions.items()}
    file = tmp_path / "locked.txt"
    file.write_text(text)
    refused = pip(tmp_path, file)
    assert refused.returncode == 1
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    for name, wheel in wheels.items():  # the counter-proof: with the stand-ins' own hashes they go
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        text = text.replace(Pins(text).hashes[name][0], digest)
    file.write_text(text)
    taken = pip(tmp_path, file)
    assert taken.returncode == 0, taken.stderr
    assert taken.stdout.count("Would install") == 1
    for name, version in Pins(text).versions.items():
        assert f"{name}-{version}" in taken.stdout.lower().replace("_", "-")


def test_a_check_that_checked_nothing_says_so(tmp_path: Path) -> None:
    """pip-audit itself says "No known vulnerabilities found" where no package is known."""
    pytest.importorskip("pip_audit")
    script = SOURCE / "scripts" / "check-vulnerabilities"
    file = tmp_path / "locked.txt"
    file.write_text("no-such-package-of-recallseg==1.0 \\\n    --hash=sha256:" + "0" * 64 + "\n")
    command = [sys.executable, script, file]
    closed = {
        **os.environ,
        "https_proxy": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=closed)
    assert done.returncode == 1, done.stderr
    assert "0 of 1 locked versions in 1 files were checked" in done.stdout
    assert "NOTHING WAS CHECKED" in done.stderr
    file.write_text("# nothing\n")
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "NOTHING WAS CHECKED" in done.stderr) == (1, True)


@pytest.mark.parametrize("unknown", [False, True])
def test_found_vulnerabilities_and_gaps_are_told(tmp_path: Path, unknown: bool) -> None:
    """With what pip-audit writes: a package with a hole, one without, and one that is not known."""
    answer = [
        {"name": "alpha", "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}]},
        {"name": "beta", "version": "2.0", "vulns": []},
    ]
    if unknown:
        answer = [answer[1], {"name": "alpha", "skip_reason": "not found"}]
    (tmp_path / "pip_audit.py").write_text(
        "import json, sys\n"
        f"answer = {json.dumps({'dependencies': answer})}\n"
        "open(sys.argv[sys.argv.index('--output') + 1], 'w').write(json.dumps(answer))\n"
    )
    file = tmp_path / "locked.txt"
    file.write_text("alpha==1.0 \\\n    --hash=sha256:0\nbeta==2.0\n")
    done = subprocess.run(
        [sys.executable, SOURCE / "scripts" / "check-vulnerabilities", file],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    if unknown:
        assert done.returncode == 1
        assert "NOT CHECKED: alpha 1.0 (not found)" in done.stderr
    else:
        assert done.returncode == 2
        assert "alpha 1.0: CVE-1, mended in 1.1" in done.stdout
        assert "2 of 2 locked versions" in done.stdout
