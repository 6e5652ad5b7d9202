"""What the system did not do is told with the file that it did not do it to."""

from __future__ import annotations

import ast
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_bundle import make_fake_bundle
from support.ungiven import ungiven
from typer.testing import CliRunner

from recallseg import commands, engines, export, runtime
from recallseg.cli import app
from recallseg.engines.bundle import Bundle
from recallseg.engines.digest import digest_file
from recallseg.engines.errors import BundleError, SignatureError
from recallseg.engines.inside import (
    list_inside,
    make_folder_inside,
    open_inside,
    read_inside,
    remove_inside,
    replace_inside,
    sync_inside,
)
from recallseg.engines.reading import is_there, read_file, read_text, walk
from recallseg.engines.signing import check_bundle, check_file, create_key

WAYS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "open": ("open", lambda root: open_inside(root, "top"), "top"),
    "open a folder": ("open", lambda root: list_inside(root, "below"), "below"),
    "read": ("read", lambda root: read_inside(root, "below/file", 99), "below/file"),
    "read all": ("read", lambda root: read_file(root / "below" / "file"), "below/file"),
    "read text": ("read", lambda root: read_text(root / "below" / "file"), "below/file"),
    "digest": ("read", lambda root: digest_file(root / "below" / "file"), "below/file"),
    "cut": (
        *("ftruncate", lambda root: open_inside(root, "below/file", os.O_WRONLY | os.O_TRUNC)),
        "below/file",
    ),
    "rename": (
        "replace",
        lambda root: replace_inside(root, "below/file", "below/new"),
        "below/new",
    ),
    "sync a name": ("fsync", lambda root: replace_inside(root, "below/file", "new"), "new"),
    "remove": ("unlink", lambda root: remove_inside(root, "below/file"), "below/file"),
    "make": ("mkdir", lambda root: make_folder_inside(root, "new"), "new"),
    "list": ("listdir", lambda root: list_inside(root, "below"), "below"),
    "sync": ("fsync", lambda root: sync_inside(root, "below"), "below"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(b"content")
    (tmp_path / "top").write_bytes(b"content")
    return tmp_path


class Failing(io.FileIO):
    """A file that can be opened and not read."""

    def read(self, size: int | None = -1) -> Any:
        self.close()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    readall = read

    def readinto(self, buffer: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def fail(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Let a call of the system fail: as it does itself, with the name that it was given."""

    def failing(given: Any, *_: Any, **where: Any) -> Any:
        named = (given,) if isinstance(given, str) else ()
        raise OSError(errno.EIO, os.strerror(errno.EIO), *named)

    if call == "read":
        monkeypatch.setattr(os, "fdopen", lambda number, *_: Failing(number))
        monkeypatch.setattr(Path, "open", lambda path, *_: Failing(path))
        monkeypatch.setattr(io, "open", lambda path, *_, **__: io.TextIOWrapper(Failing(path)))
        monkeypatch.setattr(Path, "read_bytes", lambda path: Failing(path).read())
        monkeypatch.setattr(Path, "read_text", lambda path, encoding: Failing(path).read())
        return
    real = os.open

    def opened(path: Any, flags: int, *rest: Any, **where: Any) -> int:
        return failing(path) if "dir_fd" in where else real(path, flags, *rest, **where)  # type: ignore[no-any-return]

    monkeypatch.setattr(os, call, opened if call == "open" else failing)


@pytest.mark.parametrize("way", WAYS)
def test_an_error_of_the_system_names_the_whole_path(
    root: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    call, do, name = WAYS[way]
    with monkeypatch.context() as failing:
        fail(failing, call)
        with pytest.raises(OSError, match="Input/output error") as caught:
            do(root)
    assert caught.value.filename == str(root / name)
    assert caught.value.filename2 is None


def test_nothing_is_read_without_its_name() -> None:
    """``Path.read_bytes`` and ``read_text`` fail without a name: ours take their place."""
    found = []
    rooms = [Path(str(room.__file__)).parent for room in (engines, runtime, export, commands)]
    files = [file for room in rooms for file in room.rglob("*.py") if file.name != "reading.py"]
    files = [file for file in files if file.parent.name != "demo_model"]  # is not installed
    assert len(files) > 200
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr in ("read_bytes", "read_text"):
                found.append(f"{file}:{called.lineno} {ast.unparse(called)}")
    # Metadata and resources of packages, a model's card, and what Linux tells of the machine.
    known = {"dist.read_text", "card.read_text", "path.read_text", "file.read_bytes"}
    assert {each.rpartition(" ")[2] for each in found} == known, found


def test_a_signature_that_the_disk_does_not_give_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    make_fake_bundle(bundle)
    key = create_key(tmp_path / "key")
    manifest = (bundle / "manifest.json").read_bytes()
    with pytest.raises(SignatureError, match="not signed"):
        check_bundle(bundle, manifest, [key])
    with monkeypatch.context() as failing:
        fail(failing, "open")
        for check in (
            lambda: check_bundle(bundle, manifest, [key]),
            lambda: check_file(tmp_path / "key.pub", [key]),
        ):
            with pytest.raises(OSError, match=str(tmp_path)):
                check()


@pytest.mark.parametrize("call", ["open", "pwrite", "replace", "fsync"])
def test_signing_a_bundle_says_where_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    make_fake_bundle(tmp_path / "bundle")
    create_key(tmp_path / "key")
    with monkeypatch.context() as failing:
        fail(failing, call)
        done = CliRunner().invoke(
            app, ["sign", "bundle", str(tmp_path / "bundle"), "--key", str(tmp_path / "key")]
        )
    assert done.exit_code == 1
    assert str(tmp_path / "bundle") in done.output.replace("\n", "")
    assert "Input/output error" in done.output


def test_only_what_is_known_not_to_be_there_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    assert all(is_there(tmp_path / name) for name in ("", "file", "link"))
    assert not any(is_there(tmp_path / name) for name in ("none", "file/none", "n" * 300, "\0"))
    with ungiven(tmp_path / "file"), pytest.raises(OSError, match="Input/output"):
        is_there(tmp_path / "file")


def test_a_folder_that_is_not_given_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "below" / "deep").mkdir(parents=True)
    assert [Path(folder).name for folder, _, _ in walk(tmp_path / "below")] == ["below", "deep"]
    assert [*walk(tmp_path / "none")] == []
    with ungiven(tmp_path / "below" / "deep"), pytest.raises(OSError, match="Input/output"):
        [*walk(tmp_path)]


def test_a_bundle_that_is_not_given_is_not_said_to_be_missing(tmp_path: Path) -> None:
    make_fake_bundle(tmp_path / "bundle")
    manifest = tmp_path / "bundle" / "manifest.json"
    with ungiven(manifest), pytest.raises(BundleError, match=f"{manifest} cannot be looked at"):
        Bundle.open(tmp_path / "bundle")
