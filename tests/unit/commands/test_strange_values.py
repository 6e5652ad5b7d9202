"""Values that are odd and may be typed, or come of a script: refused before the work, and why."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.fake_bundle import make_fake_bundle
from support.fake_library import add, create
from support.pictures import LABELS, write_pairs
from typer.testing import CliRunner, Result

from recallseg import Library, cli


def run(*arguments: object) -> Result:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def refused(*arguments: object, status: int = 2) -> str:
    done = run(*arguments)
    assert done.exit_code == status, done.output
    return " ".join(done.stderr.replace("│", " ").split())


@pytest.fixture
def library(tmp_path: Path) -> Path:
    with create(tmp_path / "library") as made:
        for number in range(3):
            add(made, number, key=f"case {number}")
    return tmp_path / "library"


@pytest.mark.parametrize(
    "arguments",
    [
        ("segment", "LIB", "", "--output", "out"),
        ("segment", "", "q.png", "--output", "out"),
        ("segment", "LIB", "q.png", "--output", ""),
        ("segment", "LIB", "q.png", "--output="),
        ("library", "remove", "", "case 0"),
        ("audit", "verify", "log", "--known", ""),
        ("export", "--output", ""),
        ("segment", "--output", "out", "--", "LIB", ""),
    ],
)
def test_what_is_empty_is_not_the_folder_that_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "is empty. Give it a value" in refused(*arguments)
    assert not [*tmp_path.iterdir()]


def test_a_key_that_is_named_twice_is_removed_once(library: Path) -> None:
    done = run("library", "remove", library, "case 1", "case 1", "case 2", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["removed"] == ["case 1", "case 2"]
    assert [exemplar.key for exemplar in Library.open(library)] == ["case 0"]


@pytest.mark.parametrize("seconds", ["inf", "nan", "0", "-1", "1e300"])
def test_verification_ends_some_day(seconds: str) -> None:
    said = refused("verify", "demo", "--most-seconds", seconds, status=1)
    assert "above 0, and the time at most 1,000,000 s" in said


@pytest.mark.parametrize("threads", ["0", "4097", "99999999999999"])
def test_no_machine_has_so_many_threads(threads: str) -> None:
    refused("verify", "demo", "--threads", threads, status=2 if threads == "0" else 1)


def test_budgets_are_of_a_memory_that_there_may_be() -> None:
    for size in ("inf", "nan", "1e300"):
        assert "--memory" in refused("doctor", "--budget", "--memory", size)


def test_a_folder_is_watched_for_a_change_that_may_come(library: Path, tmp_path: Path) -> None:
    said = refused("watch", library, tmp_path, "--output", tmp_path / "out", "--settle", "inf")
    assert "--settle" in said


def test_a_recording_is_replayed_or_kept(tmp_path: Path) -> None:
    said = refused("mrd", "--replay", "a", "--record", "b", "--openrecon", "c")
    assert "--replay and --openrecon and --record exclude each other" in said
    refused("mrd", "--replay", "a", "--port", "70000")


def test_what_is_usual_is_not_more_than_the_most() -> None:
    said = refused("build", "demo", "--engine", "tensorrt-rtx", "--k", "32")
    assert "32 is more than --max-k 16" in said
    said = refused("build", "demo", "--engine", "tensorrt-rtx", "--n", "5")
    assert "5 is more than --max-n 4" in said


def test_a_release_says_what_is_wrong_with_its_bill(library: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    key = tmp_path / "key"
    run("sign", "key", key)
    release = ("library", "release", library, "--version", "1.0.0", "--key", key)
    bill = tmp_path / "bill.json"
    for text, words in (("{bad", "no JSON:"), ("[1]", "no JSON object")):
        bill.write_text(text)
        assert words in refused(*release, "--sbom", bill)
    assert "go with --evaluate" in refused(*release, "--labels", "1=a")
    assert "go with --evaluate" in refused(*release, "--k", "2")


def test_a_library_is_not_evaluated_as_one_of_another_bundle(tmp_path: Path) -> None:
    make_fake_bundle(tmp_path / "one")
    make_fake_bundle(tmp_path / "other", weights_digest="1" * 64)
    write_pairs(tmp_path / "pool", [0.2, 0.35, 0.5, 0.65])
    command = ("evaluate", tmp_path / "lib", tmp_path / "pool", "--labels", LABELS)
    command += ("--split-by", "file", "--engine", "fake", "--k", "1", "--output", tmp_path / "out")
    assert run(*command, "--bundle", tmp_path / "one").exit_code == 0
    said = refused(*command, "--bundle", tmp_path / "other", status=1)
    assert "was made with" in said
    assert run(*command).exit_code == 0


def test_volumes_of_one_name_in_two_folders_are_both_named(
    fake_bundle: object, tmp_path: Path
) -> None:
    nib = pytest.importorskip("nibabel")
    for folder in ("a", "b"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        for name, shape in (("scan.mask", (8, 8, 3)), ("scan", (8, 8, 3))):
            image = nib.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4))
            nib.save(image, tmp_path / "in" / folder / f"{name}.nii.gz")
    Library.create(tmp_path / "library", fake_bundle, engine="fake").close()  # type: ignore[arg-type]
    done = run("library", "import", tmp_path / "library", tmp_path / "in", "--labels", "1=s",
               "--engine", "fake", "--json")  # fmt: skip
    assert done.exit_code == 1
    assert {*json.loads(done.stdout)["failed"]} == {"a/scan.nii.gz", "b/scan.nii.gz"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("stream", "demo", "--memories", "a"),
        ("stream", "demo", "--memories", "-1"),
        ("stream", "demo", "--seconds", "inf"),
        ("volumes", "--memories", "a"),
        ("volumes", "--memories", "0"),
    ],
)
def test_a_bench_refuses_what_is_no_count(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    said = refused("bench", *arguments, "--output", tmp_path / "out")
    assert arguments[-2] in said
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (("evaluate", "LIB", "held", "--labels", LABELS, "--engine", "fake"),
         "recallseg.runtime.reports.evaluation.evaluate"),
        (("segment", "LIB", "held", "--engine", "fake"),
         "recallseg.runtime.segmenting.segmenter.Segmenter.__init__"),
        (("watch", "LIB", "held", "--once", "--engine", "fake"),
         "recallseg.runtime.segmenting.segmenter.Segmenter.__init__"),
        (("archive", "LIB", "held", "--engine", "fake"),
         "recallseg.runtime.services.archive.segment_archive"),
        (("bench", "latency", "demo"), "recallseg.benchmarks.latency.run_latency"),
        (("bench", "retrieval"), "recallseg.benchmarks.retrieval.run_retrieval"),
        (("bench", "stream", "demo"), "recallseg.benchmarks.streams.fill_library"),
        (("bench", "accuracy"), "recallseg.benchmarks.accuracy.run.run_accuracy"),
    ],
)  # fmt: skip
def test_where_nothing_can_be_written_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], work: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_fake_bundle(tmp_path / "bundle")
    write_pairs(tmp_path / "annotated", [0.2, 0.8])
    write_pairs(tmp_path / "held", [0.35])
    run("library", "create", "LIB", "--bundle", "bundle")
    run("library", "import", "LIB", "annotated", "--labels", LABELS, "--engine", "fake")
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr(work, lambda *given, **more: pytest.fail("it was worked"))
    for folder in ("taken", "taken/below"):
        said = refused(*command, "--output", folder, status=1)
        assert f"{folder} cannot be the folder of outputs:" in said
        assert "taken is no folder. Choose another --output." in said
    assert (tmp_path / "taken").read_text() == "a file"


def test_what_is_no_library_is_not_served_and_gets_no_log(tmp_path: Path) -> None:
    assert "there is no library" in refused("serve", tmp_path / "gone", "--port", 0, status=1)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("epoch", ["today", "1e9", "9" * 30, " "])
def test_a_bill_is_of_a_time_that_there_is(monkeypatch: pytest.MonkeyPatch, epoch: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    assert "SOURCE_DATE_EPOCH must be seconds" in refused("sbom", "--extras", "none", status=1)


def test_a_head_that_is_none_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    head = tmp_path / "head"
    said = refused("audit", "verify", tmp_path / "log", "--head", head, status=1)
    assert said == f"recallseg: the head {head} cannot be read: No such file or directory."
    head.write_bytes(bytes(range(128, 256)) * 100)
    said = refused("audit", "verify", tmp_path / "log", "--head", head, status=1)
    assert "is no head of an audit log: UnicodeDecodeError" in said
    assert len(said) < 500  # and not all that is in it


def test_a_file_is_no_folder_for_an_image_to_be_built_in(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = tmp_path / "mrd.toml"
    config.write_text('[[rules]]\nname = "a"\nlibrary = "lib"\n[mrd]\n')
    said = refused("mrd", "--config", config, "--openrecon", tmp_path / "file", status=1)
    assert said == f"recallseg: {tmp_path}/file is no folder. Name a new one."
