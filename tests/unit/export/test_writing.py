"""A bundle is replaced by a proven one or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.fake_bundle import make_fake_bundle

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import ExportError, VerificationError
from recallseg.engines.signing import SIGNATURE
from recallseg.export import converting
from recallseg.export.converting import convert_bundle
from recallseg.export.writing import write_bundle


def test_a_conversion_that_fails_leaves_the_bundle_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = Bundle.open("demo")
    old = make_fake_bundle(tmp_path / "bundle")

    def fail(*args: object) -> None:
        assert Bundle.open(old.path).identity == old.identity
        raise VerificationError("is off by 1")

    monkeypatch.setattr(converting, "convert_graph", lambda model, precision, graph: model)
    monkeypatch.setattr(converting, "_compare", fail)
    with pytest.raises(VerificationError):
        convert_bundle(demo, old.path, ["fp16"], overwrite=True)
    assert Bundle.open(old.path).identity == old.identity
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_bundle_can_be_converted_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "demo"
    shutil.copytree(Bundle.open("demo").path, path)
    (path / SIGNATURE).write_text("of the manifest that was")
    monkeypatch.setattr(converting, "convert_graph", lambda model, precision, graph: model)
    made = convert_bundle(Bundle.open(path), path, ["fp16"], overwrite=True)
    assert made.precisions["portable"] == ("fp32", "fp16")
    assert made.identity == Bundle.open("demo").identity
    assert not (path / SIGNATURE).exists()
    assert os.listdir(tmp_path) == ["demo"]


@pytest.mark.parametrize("content", ["home", "file"])
def test_what_is_no_bundle_is_never_overwritten(tmp_path: Path, content: str) -> None:
    place = tmp_path / "place"
    if content == "file":
        place.write_text("thesis")
    else:
        place.mkdir()
        (place / "thesis.tex").write_text("thesis")
    with pytest.raises(ExportError, match="something else than a bundle"):
        convert_bundle(Bundle.open("demo"), place, ["fp16"], overwrite=True)
    assert place.exists()
    with pytest.raises(ExportError, match="exists"), write_bundle(place, overwrite=False):
        pass


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with write_bundle(tmp_path / "bundle", overwrite=False) as work:
            (work / "graph").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(ExportError, match=r"cannot be written: .*No space.*unharmed"):
        fail()
    assert os.listdir(tmp_path) == []
