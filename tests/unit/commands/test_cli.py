"""The command line: every command, its exit status, and no traceback for anything a user does."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from support.fake_bundle import make_fake_bundle
from support.pictures import LABELS, disc, write_pairs
from typer.testing import CliRunner

from recallseg import __version__, cli
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.runtime.library import Library
from recallseg.runtime.reports.demo import load_slices

FAKE = ("--engine", "fake")


def call(*arguments: object, status: int = 0) -> str:
    """Run a command in this process; return what it says on stdout and stderr."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exit_code != status:
        raise AssertionError(f"status {result.exit_code}: {result.output}") from result.exception
    assert "Traceback" not in result.output
    return " ".join(result.output.replace("│", " ").split())


def answer(*arguments: object, status: int = 0) -> Any:
    """Run a command with --json; return the value on stdout."""
    result = CliRunner().invoke(cli.app, [*map(str, arguments), "--json"])
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    return tmp_path / "pairs"


@pytest.fixture
def library(fake_bundle: Bundle, tmp_path: Path, pairs: Path) -> Path:
    call("library", "create", tmp_path / "lib", "--bundle", fake_bundle.path)
    call("library", "import", tmp_path / "lib", pairs, "--labels", LABELS, *FAKE)
    return tmp_path / "lib"


@pytest.fixture
def query(tmp_path: Path) -> Path:
    path = tmp_path / "query.png"
    cv2.imwrite(str(path), disc(0.5).image)
    return path


def test_version_and_help() -> None:
    assert call("--version") == f"recallseg {__version__}"
    told = call("--help")
    for name in ("demo", "segment", "evaluate", "verify", "doctor", "export", "bench", "library"):
        assert name in told
    assert "Usage" in call("library", status=2)


def test_help_imports_neither_engines_nor_torch() -> None:
    code = (
        "import sys\n"
        "from recallseg.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'transformers', 'onnxruntime', 'tensorrt', 'scipy', 'cv2', 'numpy')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


def test_create_refuses_what_it_must(fake_bundle: Bundle, tmp_path: Path, library: Path) -> None:
    assert "there is a library in" in call(
        "library", "create", library, "--bundle", fake_bundle.path, status=1
    )
    assert "no bundle at" in call(
        "library", "create", tmp_path / "b", "--bundle", tmp_path / "none", status=1
    )
    for text in (
        "window",
        "percentile:5",
        "percentile:a:b",
        "log",
        "percentile:9:1",
        "range:0:4095",
    ):
        call(
            "library", "create", tmp_path / "b", "--bundle", fake_bundle.path,
            "--intensity", text, status=2,
        )  # fmt: skip
    assert not (tmp_path / "b").exists()
    call(
        "library", "create", tmp_path / "b", "--bundle", fake_bundle.path,
        "--intensity", "window:-160:240", "--no-sources",
    )  # fmt: skip
    with Library.open(tmp_path / "b") as made:
        assert (made.intensity.mode, made.intensity.low, made.intensity.high) == (
            "window", -160.0, 240.0,
        )  # fmt: skip
        assert not made.keeps_sources


def test_library_life(library: Path, pairs: Path, tmp_path: Path) -> None:
    listed = answer("library", "list", library)
    assert not any("disc" in exemplar["key"] for exemplar in listed["exemplars"])
    known = answer("library", "whois", library)
    assert [each["name"] for each in known][:2] == ["disc-0.00", "disc-0.20"]
    assert "disc-0.20" in call("library", "whois", library, known[1]["key"])
    assert listed["structures"]["disc"] == {"present": 6, "absent": 0}
    assert "6 exemplars" in call("library", "list", library)
    assert "0 added, 6 already there" in call(
        "library", "import", library, pairs, "--labels", LABELS, *FAKE
    )
    write_pairs(tmp_path / "more", [0.5])
    image = tmp_path / "more" / "disc-0.50.png"
    added = ("library", "add", library, image, "--labels", LABELS, "--tag", "view=axial", *FAKE)
    key = answer(*added)["key"]
    assert answer("library", "list", library)["exemplars"][-1]["tags"] == {"view": "axial"}
    assert "already has" in call("library", "add", library, image, "--labels", LABELS, status=1)
    assert "disc-9" in call("library", "remove", library, key, "disc-9", status=1)
    assert len(answer("library", "list", library)["exemplars"]) == 7
    assert "1 removed" in call("library", "remove", library, key, "--compact")
    call("library", "rebuild", library, *FAKE)
    call("library", "rebuild", library, "--index-only")
    call("library", "rebuild", library, "--index-only", "--bundle", "b", status=2)
    assert answer("library", "verify", library)["ok"]
    thresholds = answer("library", "calibrate", library, "--k", 2, *FAKE)
    assert set(thresholds) == {"disc", "core"}
    stored = answer("library", "list", library)["calibrations"]
    assert {one["structure"] for one in stored} == {"disc", "core"}
    assert all(one["recipe"]["k"] == 2 and one["current"] for one in stored)
    assert all(one["made_with"] == one["of"] for one in stored)
    assert "disc calibrated with 6 of 6 for k=2, reach=3" in call("library", "list", library)


def test_verify_reports_damage(library: Path) -> None:
    source = next(library.glob("sources/*/*.npz"))
    source.write_bytes(source.read_bytes()[:-9])
    report = answer("library", "verify", library, status=1)
    assert report["problems"]
    assert "damaged" in call("library", "verify", library, status=1)


def test_import_reports_failures_and_keeps_the_rest(
    fake_bundle: Bundle, tmp_path: Path, pairs: Path
) -> None:
    (pairs / "disc-0.40.png").write_bytes(b"no image")
    cv2.imwrite(str(pairs / "alone.png"), disc(0.3).image)
    call("library", "create", tmp_path / "lib", "--bundle", fake_bundle.path)
    told = call("library", "import", tmp_path / "lib", pairs, "--labels", LABELS, *FAKE, status=1)
    assert "5 added, 0 already there, 1 failed" in told
    assert "failed: disc-0.40" in told
    assert "1 images have no label map" in told


@pytest.mark.parametrize(
    ("option", "value"),
    [("--labels", "1"), ("--labels", "0=a"), ("--missing", "maybe"), ("--tag", "x")],
)
def test_import_called_wrongly(library: Path, pairs: Path, option: str, value: str) -> None:
    options = {"--labels": LABELS, option: value}
    call("library", "import", library, pairs, *(x for o in options.items() for x in o), status=2)


def test_segment(library: Path, query: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = call("segment", library, query, "--output", out, "--k", 2, *FAKE)
    assert "RANDOM WEIGHTS" in told
    mask = cv2.imread(str(out / "query.mask.png"), cv2.IMREAD_UNCHANGED)
    assert mask.dtype == np.uint8
    assert mask.shape == (64, 64)
    assert set(np.unique(mask)) <= {0, 1, 2}
    record = json.loads((out / "query.json").read_text())
    assert record["labels"] == {"disc": 1, "core": 2}
    assert record["provenance"]["recipe"]["k"] == 2
    assert record["provenance"]["library_digest"]
    assert record["notice"]
    assert sorted(path.name for path in out.iterdir()) == ["query.json", "query.mask.png"]
    before = (out / "query.json").read_bytes()
    told = call("segment", library, query, "--output", out, "--k", 3, *FAKE, status=1)
    assert "exists already" in told
    assert (out / "query.json").read_bytes() == before
    call("segment", library, query, "--output", out, "--k", 3, "--overwrite", *FAKE)
    assert json.loads((out / "query.json").read_text())["provenance"]["recipe"]["k"] == 3


def test_a_picture_has_a_preview(library: Path, query: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call("segment", library, query, "--output", out, "--k", 2, "--preview", *FAKE)
    assert cv2.imread(str(out / "query.preview.png")).shape == (512 + 28, 512, 3)
    again = answer("segment", library, out, query, "--output", tmp_path / "again", *FAKE)
    assert "a preview" in again["passed_over"][str(out / "query.preview.png")]
    assert len(again["results"]) == 1
    (out / "query.mask.png").unlink()
    (out / "query.json").unlink()
    told = call("segment", library, query, "--output", out, *FAKE, status=1)
    assert "query.preview.png exists already" in told
    call("segment", library, query, "--output", out, "--overwrite", *FAKE)
    assert not (out / "query.preview.png").exists()  # it showed another result


def test_why_a_result_is_suspect_stands_below_it(library: Path, tmp_path: Path) -> None:
    call("library", "calibrate", library, "--k", 2, *FAKE)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    cv2.imwrite(str(tmp_path / "noise.png"), noise)
    out = tmp_path / "out"
    told = call("segment", library, tmp_path / "noise.png", "--output", out, "--k", 2, *FAKE)
    reasons = json.loads((out / "noise.json").read_text())["quality"]["reasons"]
    assert reasons
    for name, why in reasons.items():
        assert f"noise.png: {name}: {'; '.join(why)}" in told


def test_segment_can_be_repeated_after_a_failure(
    library: Path, query: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for at in (1, 2):
        replace, calls = os.replace, [0]

        def fail(*values: Any, **named: Any) -> None:
            calls[0] += 1  # noqa: B023
            if calls[0] == at:  # noqa: B023
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(*values, **named)  # noqa: B023

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", fail)
            told = call("segment", library, query, "--output", out, *FAKE, status=1)
        assert str(out / "query.") in told  # which file it was
        assert "No space left" in told
        assert [*out.iterdir()] == []
    call("segment", library, query, "--output", out, *FAKE)
    assert sorted(path.name for path in out.iterdir()) == ["query.json", "query.mask.png"]
    with pytest.MonkeyPatch.context() as patch:
        calls[0] = 0
        patch.setattr(os, "replace", fail)  # the record's, of a mask that replaced another
        call("segment", library, query, "--output", out, "--overwrite", *FAKE, status=1)
    assert [path.name for path in out.iterdir()] == ["query.mask.png"]  # no record of another


def test_segment_a_folder(library: Path, pairs: Path, tmp_path: Path) -> None:
    (pairs / "sub").mkdir()
    cv2.imwrite(str(pairs / "sub" / "a;b.png"), disc(0.1).image)
    (pairs / "sub" / "broken.png").write_bytes(b"no image")
    found = answer(
        "segment", library, pairs, "--output", tmp_path / "out", "--structures", "core", *FAKE,
        status=1,
    )  # fmt: skip
    assert len(found["results"]) == 7
    assert list(found["failed"]) == [str(pairs / "sub" / "broken.png")]
    assert len(list((tmp_path / "out" / "sub").glob("a_b-*.mask.png"))) == 1
    assert found["results"][0]["labels"] == {"core": 1}


def test_segment_refuses(library: Path, query: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    twin = tmp_path / "other" / "query.jpg"
    twin.parent.mkdir()
    cv2.imwrite(str(twin), disc(0.3).image)
    assert "would both be written" in call(
        "segment", library, query, twin, "--output", out, *FAKE, status=1
    )
    (tmp_path / "empty").mkdir()
    assert "no image in" in call(
        "segment", library, tmp_path / "empty", "--output", out, *FAKE, status=1
    )
    assert "got 99" in call("segment", library, query, "--output", out, "--k", 99, *FAKE, status=1)
    assert "'liver'" in call(
        "segment", library, query, "--output", out, "--structures", "liver", *FAKE, status=1
    )
    call("segment", library, query, "--output", out, "--structures", "disc,disc", *FAKE, status=2)
    call("segment", library, query, "--output", out, "--k", 0, *FAKE, status=2)
    call("segment", library, query, status=2)
    assert "tensorrt" in call(
        "segment", library, query, "--output", out, "--engine", "tensorrt", status=1
    )
    assert "no engine" in call(
        "segment", library, query, "--output", out, "--engine", "abacus", status=2
    )
    told = call("segment", tmp_path / "none", query, "--output", out, *FAKE, status=1)
    assert "none" in told
    assert not out.exists()


def test_an_output_that_cannot_be_written(library: Path, query: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    told = call("segment", library, query, "--output", tmp_path / "file", *FAKE, status=1)
    assert str(tmp_path / "file") in told


def test_evaluate(library: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "test", [0.1, 0.5])
    out = tmp_path / "out"
    arguments = ("evaluate", library, tmp_path / "test", "--labels", LABELS, "--output", out, *FAKE)
    told = call(*arguments, "--k", "1,3")
    assert "Dice" in told
    assert (out / "report.html").stat().st_size > 10_000
    found = answer(*arguments, "--k", "2", "--structures", "core", "--spacing", "0.5,0.5")
    assert found["unit"] == "mm"
    assert [s["structure"] for s in found["structures"]] == ["core"]
    assert found["settings"]["engine"] == "fake"
    for option, value in (
        ("--k", "0"), ("--k", "1,x"), ("--k", "2,2"), ("--spacing", "1"), ("--spacing", "0,1"),
        ("--structures", "liver"), ("--labels", "1:a"),
    ):  # fmt: skip
        call(*arguments, option, value, status=2)
    assert "no exemplar of 'liver'" in call(*arguments, "--labels", "1=liver,2=core", status=1)
    write_pairs(tmp_path / "same", [0.4])
    nothing = ("evaluate", library, tmp_path / "same", "--labels", LABELS, *FAKE)
    told = call(*nothing, "--output", tmp_path / "none", status=1)
    assert "1 images are exemplars" in told
    assert not (tmp_path / "none").exists()


def test_verify(fake_bundle: Bundle, tmp_path: Path) -> None:
    assert "reproduces the golden tensors" in call("verify", fake_bundle.path, *FAKE)
    assert answer("verify", fake_bundle.path, *FAKE)["passed"]
    assert "precision" in call("verify", fake_bundle.path, *FAKE, "--precision", "fp16", status=1)
    other = make_fake_bundle(tmp_path / "other", image_size=128)
    manifest = other.path / "manifest.json"
    golden = json.loads((fake_bundle.path / "manifest.json").read_text())["golden"]
    (other.path / golden["file"]).write_bytes(fake_bundle.golden_file.read_bytes())
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "golden": golden}))
    assert "Traceback" not in call("verify", other.path, *FAKE, status=1)


def test_doctor() -> None:
    pytest.importorskip("onnxruntime")
    assert "ready" in call("doctor", "--no-self-test")
    assert answer("doctor", "--no-self-test")["healthy"]


def test_demo(tmp_path: Path, fake_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nilearn")
    few = load_slices(6)
    monkeypatch.setattr("recallseg.runtime.reports.demo.load_slices", lambda: few)
    bundle = fake_bundle
    out = tmp_path / "out"
    told = call("demo", "--bundle", bundle.path, "--output", out, "--k", 4, *FAKE)
    assert told.count("RANDOM WEIGHTS") == 1
    assert "white matter" in told
    assert (out / "report.html").is_file()
    with Library.open(out / "library") as library:
        assert len(library) == 6
    none_here = ("--engine", "tensorrt")
    call("demo", "--bundle", bundle.path, "--output", out, *none_here, status=1)
    with Library.open(out / "library") as library:  # what is there stays until all is
        assert len(library) == 6
    again = answer(
        "demo", "--bundle", bundle.path, "--output", out, "--k", 2, "--no-calibrate", *FAKE
    )
    assert {s["structure"] for s in again["structures"]} == {"brain", "grey matter", "white matter"}
    (out / "demo.json").unlink()
    assert "not made by the demo" in call(
        "demo", "--bundle", bundle.path, "--output", out, *FAKE, status=1
    )


class Failure:
    """Makes ``doctor`` fail in a chosen way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, error: BaseException) -> None:
        def fail(*, self_test: bool) -> None:
            raise error

        self._monkeypatch.setattr("recallseg.runtime.services.doctor.diagnose", fail)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failure:
    return Failure(monkeypatch)


def test_errors_are_one_message(failing: Failure) -> None:
    failing(InputError("something is wrong; mend it."))
    assert call("doctor", status=1) == "recallseg: something is wrong; mend it."
    failing(ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert "needs recallseg[export]" in call("doctor", status=1)
    failing(PermissionError(13, "Permission denied", "/a/b"))
    assert call("doctor", status=1) == "recallseg: /a/b: Permission denied"
    failing(MemoryError())
    assert "out of memory" in call("doctor", status=1)
    failing(KeyboardInterrupt())
    assert call("doctor", status=130) == "interrupted"


@pytest.mark.parametrize("arguments", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_shows_the_error(failing: Failure, arguments: list[str]) -> None:
    error = InputError("something is wrong")
    failing(error)
    assert CliRunner().invoke(cli.app, arguments).exception is error


def test_a_defect_is_one_message_too(
    failing: Failure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(ZeroDivisionError("division by zero"))
    monkeypatch.setattr(sys, "argv", ["recallseg", "doctor"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert "defect" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["recallseg", "doctor", "--debug"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_reader_that_leaves_early_is_no_error(library: Path) -> None:
    command = f"{sys.executable} -m recallseg library list {library} --json | head -c 1"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert found.stdout == "{"
    assert found.stderr == ""


def test_commands_mounted_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    import typer

    def export(sam2: str = "x", force: bool = False) -> None:
        """Stand for the real one."""
        typer.echo(f"{sam2} {force}")

    module = types.ModuleType("recallseg.export.commands")
    module.export = export  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recallseg.export.commands", module)
    assert call("export", "--sam2", "a b", "--force") == "a b True"
    assert "--sam2" in call("export", "--help")
    assert "No such option" in call("export", "--nothing", status=2)
    monkeypatch.setitem(sys.modules, "recallseg.export.commands", None)
    assert "recallseg.export.commands" in call("export", status=1)


def test_an_uncalibrated_result_says_the_command_that_mends_it(
    library: Path, query: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = call("segment", library, query, "--output", out, "--k", 2, "--reach", 2, *FAKE)
    record = json.loads((out / "query.json").read_text())
    assert record["quality"]["flag"] == "uncalibrated"
    mend = record["quality"]["mend"]
    assert mend in " ".join(said.split("\n"))
    _, _, command = mend.partition(": ")
    assert command.startswith("recallseg library calibrate ")
    call(*shlex.split(command)[1:])  # as a person would
    call("segment", library, query, "--output", out, "--k", 2, "--reach", 2, "--overwrite", *FAKE)
    assert json.loads((out / "query.json").read_text())["quality"]["mend"] == ""
    call("segment", library, query, "--output", out, "--k", 1, "--reach", 2, "--overwrite", *FAKE)
    other = json.loads((out / "query.json").read_text())["quality"]
    assert "calibrated for other settings" in other["mend"]


def test_tags_choose_the_exemplars(library: Path, query: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = call("segment", library, query, "--output", out, "--tag", "view=b", *FAKE, status=1)
    assert "carries the tag view=b" in said
    said = call("segment", library, query, "--output", out, "--tag", "view", *FAKE, status=2)
    assert "modality=MR" in said


@pytest.mark.parametrize(
    "wrong",
    [
        ("segment", "LIB", "IMAGE", "--output", "out", "--reach", "0.5"),
        ("segment", "LIB", "IMAGE", "--output", "out", "--reach", "nan"),
        ("segment", "LIB", "IMAGE", "--output", "out", "--engine", "steam"),
        ("segment", "LIB", "IMAGE", "--output", "out", "--precision", "fp64"),
        ("segment", "LIB", "IMAGE", "--output", "out", "--plane", "oblique"),
        ("segment", "LIB", "IMAGE", "--output", "out", "--format", "jpeg"),
        ("segment", "LIB", "IMAGE", "--output", "out", "--k", "0"),
        ("segment", "LIB", "IMAGE", "--output", "out", "--structures", "a,a"),
        ("segment", "LIB", "IMAGE", "--output", "out", "--clean-up", "noise"),
        ("watch", "LIB", "IN", "--output", "out", "--reach", "-1"),
        ("watch", "LIB", "IN", "--output", "out", "--engine", "steam"),
        ("watch", "LIB", "IN", "--output", "out", "--plane", "oblique"),
        ("evaluate", "LIB", "IN", "--labels", "1=a", "--output", "out", "--reach", "0"),
        ("evaluate", "LIB", "IN", "--labels", "1=a", "--output", "out", "--precision", "fp64"),
        ("evaluate", "LIB", "IN", "--labels", "1=a", "--output", "out", "--k", "0"),
        ("library", "create", "LIB", "--bundle", "demo", "--memories", "int4"),
        ("library", "create", "LIB", "--bundle", "demo", "--intensity", "loud"),
        ("library", "calibrate", "LIB", "--reach", "0"),
        ("library", "calibrate", "LIB", "--engine", "steam"),
        ("library", "add", "LIB", "IMAGE", "--labels", "1=a", "--precision", "fp64"),
        ("library", "rebuild", "LIB", "--engine", "steam"),
    ],
)
def test_a_wrong_value_is_a_usage_error_before_anything_is_opened(
    wrong: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the files exists: what looked at them first would give status 1."""
    monkeypatch.chdir(tmp_path)
    call(*wrong, status=2)
    assert not any(tmp_path.iterdir())
