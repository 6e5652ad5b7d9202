"""Signatures of bundles and of other files: who made them, and that they are as they were made.

Ed25519 (RFC 8032) by the package ``cryptography``, which is the extra ``signing``. A bundle's
signature is of its manifest, which has the SHA-256 of every graph, of the weights beside them and
of the golden tensors; it lies in ``signature.json`` beside it. The signature of a file lies in
``FILE.sig``.

Where ``RECALLSEG_TRUST`` names a file of public keys, only bundles that one of them signed are
opened, by whatever way: a library, a service, the C interface.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recallseg.engines.digest import digest_file
from recallseg.engines.durable import creating, replace_file
from recallseg.engines.errors import InputError, SignatureError
from recallseg.engines.inside import ForeignFileError, read_inside
from recallseg.engines.ownership import foreign
from recallseg.engines.reading import read_file, read_text, reason

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = [
    "PublicKey",
    "SigningKey",
    "check_bundle",
    "check_document",
    "check_file",
    "check_private",
    "create_key",
    "read_trusted",
    "sign_bundle",
    "sign_document",
    "sign_file",
    "trusted_keys",
]

SIGNATURE = "signature.json"
TRUST = "RECALLSEG_TRUST"
_CONTEXT = b"recallseg-signature-1\0"
_MOST_BYTES = 2**16


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 public key (32 bytes) and what its owner is called."""

    raw: bytes
    name: str = ""

    @property
    def id(self) -> str:
        """First 16 hex digits of the key's SHA-256, to tell keys apart."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    def to_line(self) -> str:
        """Return the line that a file of trusted keys has for it."""
        return f"ed25519 {base64.b64encode(self.raw).decode()} {self.name}".rstrip()

    def verifies(self, message: bytes, signature: bytes) -> bool:
        """Whether this key's owner signed the message."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


class SigningKey:
    """An Ed25519 private key."""

    def __init__(self, key: Ed25519PrivateKey, name: str = "") -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes_raw(), name)

    @classmethod
    def read(cls, path: str | Path) -> SigningKey:
        """Read the file that :func:`create_key` wrote (PEM, PKCS 8, not encrypted).

        Raises
        ------
        InputError
            If it is no such file, cannot be read, or others may read it.
        """
        _need_cryptography()
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        path = Path(path)
        check_private(path)
        try:
            key = load_pem_private_key(read_file(path), None)
        except OSError as error:
            raise InputError(f"the key {path} cannot be read: {error.strerror}.") from error
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is no private key: {error}.") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise InputError(f"{path} is a key of another kind; expected Ed25519.")
        return cls(key, path.stem)

    def sign(self, message: bytes) -> bytes:
        """Return the signature, 64 bytes."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"SigningKey({self.public.name!r}, {self.public.id})"


def create_key(path: str | Path, name: str = "") -> PublicKey:
    """Make a private key in a new file (0600), and ``PATH.pub`` with the line others need.

    Raises
    ------
    InputError
        If there is such a file, or it cannot be written.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    path = Path(path)
    key = Ed25519PrivateKey.generate()
    made = SigningKey(key, name or path.stem)
    try:
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        public = path.with_name(path.name + ".pub")
        with creating(path, secret, mode=0o600):
            # First the half that may be replaced: a process that dies leaves no key without it.
            replace_file(public, f"{made.public.to_line()}\n".encode())
    except OSError as error:
        raise InputError(f"the key {path} cannot be written: {error.strerror}.") from error
    return made.public


def check_private(path: Path) -> None:
    """Refuse a secret that others may read, as OpenSSH does: InputError."""
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"the key {path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"the key {path} is no file.")
    if told := foreign(path, found, secret=True):
        raise InputError(f"the key is not yours alone: {told}")


def read_trusted(path: str | Path) -> tuple[PublicKey, ...]:
    """Read a file of public keys, a line each: ``ed25519 BASE64 NAME``; ``#`` begins a comment.

    Raises
    ------
    InputError
        If it cannot be read, a line is none, there is no key, or others may write it.
    """
    path = Path(path)
    try:
        found = path.stat()
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise InputError(f"the trusted keys {path} cannot be read: {error}.") from error
    if told := foreign(path, found):
        raise InputError(f"whom the trusted keys name is not yours to say: {told}")
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split(None, 2)
        if not words:
            continue
        try:
            kind, raw = words[0], base64.b64decode(words[1], validate=True)
        except (IndexError, binascii.Error, ValueError):
            kind, raw = "", b""
        if kind != "ed25519" or len(raw) != 32:
            raise InputError(f"{path}, line {number} is no key; expected 'ed25519 BASE64 NAME'.")
        keys.append(PublicKey(raw, words[2].strip() if len(words) > 2 else ""))
    if not keys:
        raise InputError(f"{path} has no key, so nothing would be trusted.")
    return tuple(keys)


def trusted_keys() -> tuple[PublicKey, ...] | None:
    """Return the keys in the file ``$RECALLSEG_TRUST``; None where it names none."""
    path = os.environ.get(TRUST)
    if not path:
        return None
    _need_cryptography()
    return read_trusted(path)


def sign_bundle(folder: str | Path, key: SigningKey) -> None:
    """Sign a bundle's manifest, and with it all files that the manifest has the digest of.

    Every file is compared with its digest first.

    Raises
    ------
    BundleError
        If the bundle is not what its manifest says.
    """
    from recallseg.engines.bundle import Bundle
    from recallseg.engines.manifest import read_manifest

    folder = Path(folder)
    Bundle(folder, read_manifest(folder, trust=())).check_files()
    document = read_inside(folder, "manifest.json", 2**24)
    replace_file(folder / SIGNATURE, sign_document("bundle", document, key))


def check_bundle(folder: Path, manifest: bytes, trust: Sequence[PublicKey]) -> PublicKey:
    """Return whose signature a bundle has.

    Parameters
    ----------
    manifest : as it was read.

    Raises
    ------
    SignatureError
        If none of ``trust`` signed it.
    """
    try:
        signature = read_inside(folder, SIGNATURE, _MOST_BYTES)
    except (FileNotFoundError, ForeignFileError):
        signature = b""
    return check_document(f"bundle {folder}", "bundle", manifest, signature, trust)


def sign_file(path: str | Path, key: SigningKey) -> Path:
    """Sign a file, for instance a library's release; return the signature's path, ``PATH.sig``."""
    path = Path(path)
    target = path.with_name(path.name + ".sig")
    replace_file(target, sign_document("file", digest_file(path).encode(), key))
    return target


def check_file(path: str | Path, trust: Sequence[PublicKey]) -> PublicKey:
    """Return whose signature ``PATH.sig`` is.

    Raises
    ------
    SignatureError
        If none of ``trust`` signed the file as it is.
    """
    path = Path(path)
    try:
        signature = read_inside(path.parent, path.name + ".sig", _MOST_BYTES)
    except (FileNotFoundError, ForeignFileError):
        signature = b""
    return check_document(str(path), "file", digest_file(path).encode(), signature, trust)


def _message(kind: str, document: bytes) -> bytes:
    return _CONTEXT + kind.encode() + b"\0" + hashlib.sha256(document).digest()


def sign_document(kind: str, document: bytes, key: SigningKey) -> bytes:
    """Return a signature, as JSON, of a document that stands for more; see :func:`check_document`.

    ``kind`` is signed with it, so that no signature serves for another kind of thing.
    """
    signed = {
        "format": "recallseg-signature",
        "version": 1,
        "kind": kind,
        "key": base64.b64encode(key.public.raw).decode(),
        "signature": base64.b64encode(key.sign(_message(kind, document))).decode(),
    }
    return json.dumps(signed, indent=1).encode() + b"\n"


def check_document(
    what: str, kind: str, document: bytes, signature: bytes, trust: Sequence[PublicKey]
) -> PublicKey:
    """Return whose signature of a document it is; ``what`` names it in messages.

    Raises
    ------
    SignatureError
        If there is none (empty), or none of ``trust`` made it for this very document.
    """
    if not signature:
        raise SignatureError(
            f"{what} is not signed, and only what trusted keys signed is used here. Have it signed "
            "('recallseg sign'), or trust others' too."
        )
    try:
        stated: Any = json.loads(signature)
        raw = base64.b64decode(stated["signature"], validate=True)
        named = base64.b64decode(stated["key"], validate=True)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SignatureError(f"the signature of {what} cannot be read: {reason(error)}.") from error
    for key in trust:
        if key.raw == named:
            if key.verifies(_message(kind, document), raw):
                return key
            raise SignatureError(
                f"{what} is not what '{key.name or key.id}' signed: it was changed since, or the "
                "signature is forged. Ask for it anew from who made it."
            )
    raise SignatureError(
        f"{what} is signed by a key that is not trusted here ({PublicKey(named).id}); trusted are "
        f"{', '.join(f'{key.name} {key.id}'.strip() for key in trust)}."
    )


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise InputError(
            "signatures need the package cryptography, which is not installed: "
            "pip install 'recallseg[signing]'."
        ) from error
