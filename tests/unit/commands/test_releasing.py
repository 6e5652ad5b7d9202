"""``recallseg library release``, ``install`` and ``diff``, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.fake_bundle import make_fake_bundle
from support.pictures import LABELS, write_pairs
from support.records import check_written
from typer.testing import CliRunner

from recallseg.cli import app

pytest.importorskip("cryptography")


def run(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == status, done.output
    return done.stdout


def test_a_library_goes_to_a_device_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_fake_bundle(tmp_path / "bundle")
    write_pairs(tmp_path / "annotated", [0.2, 0.5, 0.8])
    write_pairs(tmp_path / "held-out", [0.35, 0.65])
    write_pairs(tmp_path / "more", [0.1])
    engine = ("--engine", "fake")
    run("sign", "key", "maker")
    run("library", "create", "discs", "--bundle", "bundle")
    run("library", "import", "discs", "annotated", "--labels", LABELS, *engine)
    release = ("library", "release", "discs", "--key", "maker", "--evaluate", "held-out")
    said = run(*release, "--labels", LABELS, "--version", "1.0.0", *engine, "--json")
    stated = json.loads(said)
    assert stated["evaluation"]["dice"]["disc"]["cases"] == 2
    assert stated["images"] is False
    run("library", "import", "discs", "more", "--labels", LABELS, *engine)
    run(*release, "--labels", LABELS, "--version", "1.1.0", *engine)
    install = ("--into", "site", "--trust", "maker.pub")
    assert "site/current" in run("library", "install", "discs-1.0.0.release", *install)
    found = json.loads(
        run("library", "diff", "site", "discs-1.1.0.release", "--trust", "maker.pub", "--json")
    )
    assert (len(found["added"]), found["removed"], found["changed"]) == (1, [], {})
    assert found["dice"]["core"]["cases"] == 2
    check_written(found)
    for site in ("site/current", "site/1.0.0"):  # what it says of itself lies beside it
        told = run("library", "diff", site, "discs-1.1.0.release", "--trust", "maker.pub")
        assert "Dice of core: " in told
    assert run("library", "diff", "discs", "discs") == "no difference\n"
    picture = next((tmp_path / "annotated").glob("*.png"))
    done = CliRunner().invoke(
        app, ["library", "diff", "discs", str(picture), "--trust", "maker.pub"]
    )
    assert "is no release of a library" in done.output
    run("library", "install", "discs-1.1.0.release", *install)
    listed = json.loads(run("library", "list", "site/current", "--json"))
    assert len(listed["exemplars"]) == 4
    assert (
        "discs 1.0.0"
        in CliRunner().invoke(app, ["library", "install", "--rollback", "--into", "site"]).output
    )
    run("library", "install", *install, status=2)  # neither a file nor --rollback
    run("library", "install", "discs-1.1.0.release", "--into", "site", status=2)  # by whose keys?


@pytest.mark.parametrize("text", [b"{not", b"[1]", b"\xff\xfe{}", b"[" * 100_000])
def test_a_list_of_parts_that_is_none_is_told(tmp_path: Path, text: bytes) -> None:
    """It is read before the library is."""
    run("sign", "key", tmp_path / "maker")
    (tmp_path / "sbom.json").write_bytes(text)
    release = ("library", "release", tmp_path / "none", "--key", tmp_path / "maker")
    run(*release, "--version", "1.0.0", "--sbom", tmp_path / "sbom.json", status=2)
