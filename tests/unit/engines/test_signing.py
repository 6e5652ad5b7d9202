"""Signatures: what is signed is used, what is not is refused, by whatever way it is opened."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recallseg.cli import app
from recallseg.engines import signing
from recallseg.engines.bundle import Bundle
from recallseg.engines.digest import digest_file
from recallseg.engines.errors import BundleError, InputError, SignatureError
from recallseg.engines.machine_fault import machine_fault
from recallseg.engines.signing import (
    PublicKey,
    SigningKey,
    check_file,
    create_key,
    read_trusted,
    sign_bundle,
    sign_file,
    trusted_keys,
)
from recallseg.runtime.library import Library

RFC_8032 = (  # section 7.1, test 2
    "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
    "72",
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
)


@pytest.fixture
def folder(tmp_path: Path, fake_bundle: Bundle) -> Path:
    return Path(shutil.copytree(fake_bundle.path, tmp_path / "bundle"))


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    create_key(tmp_path / "maker")
    return SigningKey.read(tmp_path / "maker")


@pytest.fixture
def trust(tmp_path: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECALLSEG_TRUST", str(tmp_path / "maker.pub"))
    return tmp_path / "maker.pub"


def test_the_algorithm_is_that_of_the_standard() -> None:
    public, message, signature = map(bytes.fromhex, RFC_8032)
    assert PublicKey(public).verifies(message, signature)
    assert not PublicKey(public).verifies(message + b"x", signature)


def test_a_signed_bundle_opens_and_an_unsigned_one_does_not(
    folder: Path, key: SigningKey, trust: Path, tmp_path: Path
) -> None:
    assert trusted_keys() == (key.public,)
    for way in (
        lambda: Bundle.open(folder),
        lambda: Bundle.open("demo"),
        lambda: Library.create(tmp_path / "library", folder),
    ):
        with pytest.raises(SignatureError, match="is not signed"):
            way()
    sign_bundle(folder, key)
    assert Bundle.open(folder).name == "fake"
    Library.create(tmp_path / "library", folder, engine="fake").close()
    assert Library.open(tmp_path / "library").bundle.path == folder


def test_what_is_changed_after_signing_is_found(folder: Path, key: SigningKey, trust: Path) -> None:
    sign_bundle(folder, key)
    graph = folder / "graphs/portable/fp32/attend.onnx"
    graph.write_bytes(b"\x12\x01x\x3a\0")
    with pytest.raises(BundleError, match="changed or damaged"):
        Bundle.open(folder).check_files()
    # Another graph with the same identity, its digest put into the manifest.
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["graphs"]["portable/fp32/attend"]["sha256"] = digest_file(graph)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SignatureError, match="not what 'maker' signed"):
        Bundle.open(folder)


def test_other_signatures_do_not_pass(
    folder: Path, key: SigningKey, trust: Path, tmp_path: Path
) -> None:
    create_key(tmp_path / "stranger")
    sign_bundle(folder, SigningKey.read(tmp_path / "stranger"))
    with pytest.raises(SignatureError, match="by a key that is not trusted here"):
        Bundle.open(folder)
    forged = json.loads((folder / "signature.json").read_text())
    forged["key"] = base64.b64encode(key.public.raw).decode()
    (folder / "signature.json").write_text(json.dumps(forged))
    with pytest.raises(SignatureError, match="not what 'maker' signed"):
        Bundle.open(folder)
    # A signature of a file with the same bytes is none of a bundle.
    sign_file(folder / "manifest.json", key)
    (folder / "signature.json").unlink()
    (folder / "manifest.json.sig").rename(folder / "signature.json")
    with pytest.raises(SignatureError, match="not what 'maker' signed"):
        Bundle.open(folder)
    for text in ("", "[]", "{}", '{"key": 1, "signature": 2}', "[" * 5000):
        (folder / "signature.json").write_text(text)
        with pytest.raises(SignatureError):
            Bundle.open(folder)
    (folder / "signature.json").unlink()
    (folder / "signature.json").symlink_to(tmp_path / "maker.pub")
    with pytest.raises(SignatureError, match="is not signed"):
        Bundle.open(folder)


def test_files(tmp_path: Path, key: SigningKey) -> None:
    path = tmp_path / "release.tar"
    path.write_bytes(b"a library")
    with pytest.raises(SignatureError, match="is not signed"):
        check_file(path, [key.public])
    sign_file(path, key)
    assert check_file(path, [key.public]) == key.public
    path.write_bytes(b"another one")
    with pytest.raises(SignatureError, match="was changed since"):
        check_file(path, [key.public])


def test_keys_are_kept_as_keys_should(tmp_path: Path, key: SigningKey) -> None:
    private = tmp_path / "maker"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    with pytest.raises(InputError, match="cannot be written"):
        create_key(private)
    private.chmod(0o640)
    with pytest.raises(InputError, match="chmod 600"):
        SigningKey.read(private)
    public = tmp_path / "maker.pub"
    (tmp_path / "keys").write_text(f"# ours\n\n{public.read_text()}ed25519 AAAA short\n")
    with pytest.raises(InputError, match="line 4 is no key"):
        read_trusted(tmp_path / "keys")
    (tmp_path / "keys").write_text("# nobody\n")
    with pytest.raises(InputError, match="has no key"):
        read_trusted(tmp_path / "keys")
    public.chmod(0o666)
    with pytest.raises(InputError, match="others may write"):
        read_trusted(public)
    for content in (b"", b"-----BEGIN PRIVATE KEY-----\n"):
        (tmp_path / "none").write_bytes(content)
        (tmp_path / "none").chmod(0o600)
        with pytest.raises(InputError, match="is no private key"):
            SigningKey.read(tmp_path / "none")


def test_a_key_that_the_disk_does_not_give_is_not_called_none(
    tmp_path: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.pem"
    create_key(path)

    def fail(file: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

    monkeypatch.setattr(signing, "read_file", fail)
    with pytest.raises(InputError, match=r"own\.pem cannot be read: Input/output error\.") as told:
        SigningKey.read(path)
    assert machine_fault(told.value) == errno.EIO


def test_commands(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECALLSEG_TRUST", raising=False)

    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(map(str, arguments)))
        return result.exit_code, result.output

    status, line = run("sign", "key", tmp_path / "k", "--name", "Clinic")
    assert status == 0
    assert line.startswith("ed25519 ")
    trust = tmp_path / "k.pub"
    verify = ("verify", folder, "--engine", "fake")
    status, text = run("--trust", trust, *verify)
    assert status == 1
    assert "is not signed" in text
    assert run("sign", "bundle", folder, "--key", tmp_path / "k")[0] == 0
    assert run("--trust", trust, *verify)[0] == 0
    status, text = run("sign", "check", folder, "--trust", trust)
    assert (status, text.rstrip()[-25:-16]) == (0, "y Clinic ")
    (folder / "golden/golden.npz").write_bytes(b"")
    assert run("sign", "check", folder, "--trust", trust)[0] == 1
    assert run("sign", "bundle", folder, "--key", tmp_path / "k")[0] == 1
    assert run(*verify)[0] == 1
