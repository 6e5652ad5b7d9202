"""librecallseg as device software meets it: built with CMake, linked, called well and badly."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from time import process_time

import cv2
import numpy as np
import pytest
from support.measuring import measures
from support.native import SOURCE, Installed, make_fake_library, passed, run
from support.tracing import trace

from recallseg import Library, Segmenter, __version__
from recallseg.benchmarks.makers.capi import CLibrary, measure_overhead
from recallseg.runtime.reports.demo import load_slices
from recallseg.runtime.services.audit import verify_audit_log
from recallseg.runtime.services.audit_keys import create_audit_key, read_audit_key
from recallseg.runtime.services.c_errors import STATUS
from recallseg.runtime.services.c_interface import INTERFACE

MOST_OVERHEAD_MS = 0.5
CHECKS = ("no_python", "hostile", "layouts", "deadline", "threads", "memory", "forked", "signals")


def check(capi: Installed, name: str, library: Path, **env: str) -> str:
    scratch = library.parent / "scratch"
    return passed(capi.checks, name, library, scratch, env={**capi.env, **env})


@pytest.mark.parametrize("name", [*CHECKS, "logging", "exemplars", "streams", "wrapper"])
def test_the_checks_pass(capi: Installed, fake_library: Path, name: str) -> None:
    assert f"{name}: done" in check(capi, name, fake_library)


@pytest.mark.parametrize("name", [*CHECKS, "logging", "exemplars", "streams", "wrapper"])
def test_a_program_compiled_with_the_first_header_runs_with_this_library(
    capi: Installed, fake_library: Path, name: str
) -> None:
    program, scratch = capi.checks.with_name("checks_abi1"), fake_library.parent / "abi1"
    scratch.mkdir(exist_ok=True)
    found = passed(program, name, fake_library, scratch, env=capi.env)
    assert f"{name}: done" in found


def test_the_first_header_is_not_changed_by_what_came_later() -> None:
    first, now = (
        (SOURCE / folder / "recallseg.h").read_text()
        for folder in ("tests/fixtures/capi/abi1", "engines/native/capi/include")
    )
    structs = re.compile(r"typedef struct (\w+) \{(.*?)\} \1;", re.DOTALL)
    comments = re.compile(r"/\*.*?\*/", re.DOTALL)
    members = {
        text: {
            name: [" ".join(m.split()) for m in comments.sub("", body).split(";") if m.strip()]
            for name, body in structs.findall(text)
        }
        for text in (first, now)
    }
    assert len(members[first]) > 15
    for name, old in members[first].items():
        assert members[now][name][: len(old)] == old, name
    values = re.compile(r"(RECALLSEG_\w+) = (\d+)")
    assert dict(values.findall(first)).items() <= dict(values.findall(now)).items()
    assert "#define RECALLSEG_ABI_VERSION 1u" in first
    assert "#define RECALLSEG_ABI_VERSION 2u" in now


def test_every_allocation_may_fail_once(capi: Installed, tmp_path: Path) -> None:
    library = make_fake_library(tmp_path)
    program = capi.checks.with_name("starving")
    found = passed(program, library, tmp_path / "scratch", env=capi.env)
    failed = re.search(r"starving: done, (\d+) allocations failed", found)
    assert failed is not None
    assert int(failed[1]) > 100, found


@pytest.mark.parametrize("name", ["lists", "verifies", "cancels"])
def test_the_second_abi(capi: Installed, tmp_path: Path, name: str) -> None:
    library = make_fake_library(tmp_path)
    [memories] = (library / "memories").iterdir()
    assert "done" in check(capi, name, library, DAMAGE=str(memories))


@pytest.mark.parametrize("name", ["schedules", "sessions_log"])
def test_threads_and_messages_of_onnx_runtime(
    capi: Installed, real_library: Path, name: str
) -> None:
    done = run(capi.checks, name, real_library, env=capi.env)
    assert (done.returncode, done.stderr) == (0, "")


def test_results_that_c_gets_are_entries_of_an_audit_log(capi: Installed, tmp_path: Path) -> None:
    library = make_fake_library(tmp_path)
    folder = tmp_path / "scratch"
    create_audit_key(folder / "audit.key")
    assert "done" in check(capi, "audits", library)
    log = folder / "log.jsonl"
    key = read_audit_key(folder / "audit.key")
    found = verify_audit_log(log, key=key, head=folder / "head.json")
    assert (found.entries, found.sealed) == (3, 3)  # an image, and two frames of a stream
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert {entry["event"] for entry in entries} == {"segment"}
    assert len({entry["image"] for entry in entries}) == 1
    assert len({entry["label_map"] for entry in entries}) == 1


def test_the_examples_give_what_the_command_line_gives(capi: Installed, tmp_path: Path) -> None:
    slices = load_slices()
    query = (slices.queries[6].image * 255).astype(np.uint8)
    for suffix in ("pgm", "png"):
        cv2.imwrite(str(tmp_path / f"query.{suffix}"), query)
    with Library.create(tmp_path / "library", "demo") as library:
        for exemplar in slices.exemplars[5:9]:
            # Without the brain, which is all around them and would have every pixel of the map.
            masks = {name: mask for name, mask in exemplar.masks.items() if name != "brain"}
            library.add((exemplar.image * 255).astype(np.uint8), masks, key=exemplar.name)
    passed(
        *(sys.executable, "-m", "recallseg", "segment", tmp_path / "library"),
        *(tmp_path / "query.png", "--output", tmp_path),
    )
    expected = (tmp_path / "query.mask.png", tmp_path / "query.json")
    label_map = cv2.imread(str(expected[0]), cv2.IMREAD_UNCHANGED)
    assert len(np.unique(label_map)) > 2
    for language in ("c", "cpp"):
        out = tmp_path / f"{language}.pgm"
        printed = passed(
            capi.example(language), tmp_path / "library", tmp_path / "query.pgm", out, env=capi.env
        )
        assert np.array_equal(cv2.imread(str(out), cv2.IMREAD_UNCHANGED), label_map)
        assert "grey matter" in printed


def test_a_missing_library_is_one_message(capi: Installed, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "query.pgm"), np.zeros((32, 32), np.uint8))
    for language in ("c", "cpp"):
        done = run(
            *(capi.example(language), tmp_path / "none", tmp_path / "query.pgm", tmp_path / "out"),
            env=capi.env,
        )
        assert done.returncode == 1
        assert "library not found" in done.stderr
        assert not (tmp_path / "out").exists()


def test_information_names_interpreter_and_package(capi: Installed, fake_library: Path) -> None:
    hosted, python, library, executable, prefix, package, folder, _ = check(
        capi, "info", fake_library
    ).splitlines()
    assert hosted == "0"
    assert python == ".".join(map(str, sys.version_info[:3]))
    assert "libpython" in library
    assert executable == sys.executable
    assert prefix == sys.prefix
    assert package == __version__
    assert Path(folder, "__init__.py").is_file()


def test_c_calibrates(capi: Installed, tmp_path: Path) -> None:
    library = make_fake_library(tmp_path)
    told = check(capi, "calibrates", library)
    assert "done" in told
    assert told.count("left out: 0") == 2  # exemplars: no groups are known
    known = Segmenter(library, k=2, structures=("disc", "core"), engine="fake", reach=math.inf)
    image = np.full((48, 64), 60, np.uint8)
    assert known.segment(image).quality.flag != "uncalibrated"


def test_a_program_compiled_with_the_first_header_calibrates(
    capi: Installed, tmp_path: Path
) -> None:
    """Whose ``recallseg_calibration`` ends before what was left out."""
    program = capi.checks.with_name("checks_abi1")
    found = passed(
        program, "calibrates", make_fake_library(tmp_path), tmp_path / "scratch", env=capi.env
    )
    assert "calibrates: done" in found
    assert "left out" not in found


@pytest.mark.parametrize(("patients", "left_out"), [(5, 1), (1, 2)])
def test_c_is_told_what_a_calibration_left_out(
    capi: Installed, tmp_path: Path, patients: int, left_out: int
) -> None:
    """Whole patients; of one patient's, blocks."""
    path = make_fake_library(tmp_path)
    with Library.open(path, mode="write", engine="fake") as library:
        for number, one in enumerate([*library]):
            image, masks = library.source(one.key)
            library.remove(one.key)
            library.add(image, masks, key=one.key, group=f"patient {number % patients}")
    assert check(capi, "calibrates", path).count(f"left out: {left_out}") == 2


def start(capi: Installed, fake_library: Path, **env: str) -> tuple[int, str]:
    status, message, *_ = check(capi, "starts", fake_library, **env).splitlines()
    return int(status), message


def test_a_machine_without_python_is_told_so(capi: Installed, fake_library: Path) -> None:
    status, message = start(capi, fake_library, RECALLSEG_PYTHON="/opt/none/bin/python3", PATH="")
    assert status == 6
    assert "/opt/none/bin/python3" in message
    status, message = start(capi, fake_library, RECALLSEG_PYTHON_LIBRARY="/opt/none/libpython.so")
    assert status == 6
    assert "libpython cannot be loaded" in message


def test_a_version_managers_script_is_not_taken_for_the_interpreter(
    capi: Installed, fake_library: Path, tmp_path: Path
) -> None:
    shim = tmp_path / "shims" / "python3"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    shim.chmod(0o755)
    passed(
        *("cmake", "-S", SOURCE, "-B", tmp_path / "build", f"-DPython3_EXECUTABLE={shim}"),
        "-DRECALLSEG_BUILD_CAPI=ON",
    )
    cache = (tmp_path / "build" / "CMakeCache.txt").read_text()
    assert f"RECALLSEG_DEFAULT_PYTHON:STRING={sys.executable}\n" in cache
    status, message = start(capi, fake_library, RECALLSEG_PYTHON=str(shim))
    assert status == 6
    assert "is a script" in message
    assert "sys.executable" in message


@pytest.mark.parametrize("kib", [150_000, 220_000])
def test_too_little_memory_to_start_is_not_called_a_missing_package(
    capi: Installed, fake_library: Path, kib: int
) -> None:
    limited = ("sh", "-c", f'ulimit -v {kib}; exec "$0" starts', capi.checks)
    status, message, *_ = passed(
        *limited, env={**capi.env, "OPENBLAS_NUM_THREADS": "1"}
    ).splitlines()
    assert int(status) == STATUS[MemoryError], message


def test_a_c_program_opens_no_socket_and_writes_only_what_was_named(
    capi: Installed, real_library: Path, tmp_path: Path
) -> None:
    for name in ("work", "home"):
        (tmp_path / name).mkdir()
    cv2.imwrite(str(tmp_path / "work" / "query.pgm"), np.full((48, 64), 60, np.uint8))
    env = {key: value for key, value in capi.env.items() if key != "ORT_DISABLE_TELEMETRY"}
    found = trace(
        (capi.example("c"), real_library, "query.pgm", "labels.pgm"),
        tmp_path / "work",
        {**env, "HOME": str(tmp_path / "home")},
        tmp_path / "logs",
    )
    assert found.sockets == []
    outside = found.written_outside(tmp_path / "work", real_library)
    assert [path for path in outside if "__pycache__" not in path] == []  # Python's own cache
    assert list((tmp_path / "home").iterdir()) == []


def test_an_environment_without_the_package_is_refused(
    capi: Installed, fake_library: Path, tmp_path: Path
) -> None:
    passed(sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare")
    python = tmp_path / "bare" / "bin" / "python"
    status, message = start(
        capi, fake_library, RECALLSEG_PYTHON=str(python), RECALLSEG_SITE_PACKAGES=""
    )
    assert status == 6
    assert "No module named 'recallseg'" in message


def test_a_folder_that_is_not_where_the_package_comes_from_is_refused(
    capi: Installed, fake_library: Path, tmp_path: Path
) -> None:
    # The interpreter finds recallseg elsewhere: what was asked for is not what would be used.
    env = {"PYTHONPATH": "", "RECALLSEG_SITE_PACKAGES": str(tmp_path)}
    status, message = start(capi, fake_library, **env)
    assert status == 6
    assert "recallseg" in message


def test_a_package_of_another_version_or_interface_is_refused(
    capi: Installed, fake_library: Path, tmp_path: Path
) -> None:
    passed(sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare")
    env = {
        "RECALLSEG_PYTHON": str(tmp_path / "bare" / "bin" / "python"),
        "RECALLSEG_SITE_PACKAGES": str(tmp_path),
    }
    package = tmp_path / "recallseg"
    room = package / "runtime" / "services"
    room.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '99.0'")
    status, message = start(capi, fake_library, **env)
    assert status == 3
    assert "99.0" in message
    (package / "__init__.py").write_text(f"__version__ = {__version__!r}")
    for folder in (room.parent, room):
        (folder / "__init__.py").touch()
    (room / "c_interface.py").write_text(f"INTERFACE = {INTERFACE + 1}")
    status, message = start(capi, fake_library, **env)
    assert status == 3
    assert "interface" in message


def test_a_host_that_runs_python_shares_its_interpreter(
    capi: Installed, fake_library: Path
) -> None:
    program = f"""
import sys, ctypes, os
import numpy as np
from pathlib import Path
from recallseg import Segmenter
from recallseg.benchmarks.makers.capi import CLibrary
native = CLibrary(Path({str(capi.file)!r}), Path({str(fake_library)!r}), engine="fake", k=2)
image = np.full((40, 50), 200, np.uint8)
ours = np.full((40, 50), 99, np.uint8)
native.segment(image, ours)
theirs = Segmenter({str(fake_library)!r}, k=2, engine="fake").segment(image).label_map
assert (ours == theirs).all() and theirs.any(), theirs
library = ctypes.CDLL({str(capi.file)!r})
options = (ctypes.c_void_p * 5)(40)
name = ctypes.c_char_p(b"/bin/python3")
options[1] = ctypes.cast(name, ctypes.c_void_p).value
assert library.recallseg_init(1, options) in (0, 4)
native.close()
assert library.recallseg_shutdown() == 0
print("still running", sys.version_info[:2])
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert "still running" in passed(sys.executable, "-c", program, env=env)


@pytest.mark.alone
@measures
def test_the_call_through_c_costs_little(capi: Installed) -> None:
    """The least of each: what others do on this machine makes a call longer, and none shorter."""
    found = measure_overhead(capi.file, rounds=60, clock=process_time)
    assert found.c.least - found.python.least <= MOST_OVERHEAD_MS, found


def test_pkg_config_finds_an_install_tree_that_was_moved(capi: Installed, tmp_path: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("not on this machine: pkg-config")
    shutil.copytree(capi.prefix, tmp_path / "moved", symlinks=True)
    folder = next((tmp_path / "moved").glob("lib*/**/pkgconfig"))
    flags = passed(
        *("pkg-config", "--cflags", "--libs", "recallseg"),
        env={**os.environ, "PKG_CONFIG_PATH": str(folder)},
    )
    assert str(tmp_path / "moved") in os.path.normpath(flags.split()[0].removeprefix("-I"))
    source = tmp_path / "version.c"
    source.write_text(
        "#include <recallseg.h>\nint main(void) { return *recallseg_version() - 48; }"
    )
    passed("cc", "-std=c99", "-pedantic", "-Werror", source, *flags.split(), "-o", tmp_path / "v")
    passed(tmp_path / "v", env={"LD_LIBRARY_PATH": str(folder.parent)})


def test_the_library_links_with_no_python_and_exports_only_its_own(capi: Installed) -> None:
    needed = re.findall(r"NEEDED.*\[(.+)\]", passed("readelf", "-d", capi.file))
    assert {name.split(".")[0] for name in needed} <= {
        *("libstdc++", "libgcc_s", "libc", "libm", "libdl", "libpthread", "ld-linux-x86-64"),
        "ld-linux-aarch64",
    }
    exported = passed("nm", "-D", "--defined-only", capi.file).split()[2::3]
    assert [name for name in exported if not name.startswith("recallseg_")] == [
        "RegisterCustomOps"  # which ONNX Runtime asks for, see session_log.cpp
    ]
    header = (SOURCE / "engines/native/capi/include/recallseg.h").read_text()
    declared = set(re.findall(r"\b(recallseg_\w+)\(", header))
    assert set(exported) - {"RegisterCustomOps"} == declared


def test_the_wrapper_has_all_that_the_header_has() -> None:
    header, wrapper = (
        (SOURCE / "engines/native/capi/include" / name).read_text()
        for name in ("recallseg.h", "recallseg.hpp")
    )
    declared = set(re.findall(r"\b(recallseg_\w+)\(", header))
    assert sorted(name for name in declared if not re.search(rf"\b{name}\b", wrapper)) == []


def test_header_and_package_agree() -> None:
    header = (SOURCE / "engines/native/capi/include/recallseg.h").read_text()
    assert f'#define RECALLSEG_VERSION "{__version__}"' in header
    source = (SOURCE / "engines/native/capi/src/interpreter.cpp").read_text()
    assert f"kInterface = {INTERFACE};" in source
    codes = dict(re.findall(r"RECALLSEG_E_(\w+) = (\d+)", header))
    for kind, code in STATUS.items():
        name = {"ModuleNotFoundError": "Python"}.get(kind.__name__)
        name = name or kind.__name__.removesuffix("Error")
        snake = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()
        assert int(codes[snake]) == code


@pytest.mark.parametrize("name", ["in_a_frame", "in_calls", "in_a_callback"])
def test_a_program_may_end_with_work_in_flight(
    capi: Installed, real_library: Path, name: str
) -> None:
    for _ in range(6):
        done = run(capi.checks, f"exits_{name}", real_library, env=capi.env)
        assert (done.returncode, done.stderr) == (0, "")
        assert "done" in done.stdout


def test_a_signal_ends_the_host_as_if_there_were_no_python(
    capi: Installed, fake_library: Path
) -> None:
    assert run(capi.checks, "interrupted", env=capi.env).returncode == -signal.SIGINT


def test_a_closed_handle_in_the_binding_is_an_error(capi: Installed, fake_library: Path) -> None:
    native = CLibrary(capi.file, fake_library, engine="fake", k=2)
    native.close()
    image = np.zeros((8, 8), np.uint8)
    with pytest.raises(Exception, match="status 2: the segmenter is closed"):
        native.segment(image, image.copy())
