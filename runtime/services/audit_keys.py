"""Keys that seal entries of an audit log: HMAC-SHA256 with a secret, or an Ed25519 signature.

With a secret (32 random bytes, a file of 0600) whoever checks could also forge. With Ed25519
(the extra ``signing``) the public key checks and only the private one seals.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Protocol

from recallseg.engines.durable import create_file
from recallseg.engines.errors import InputError
from recallseg.engines.reading import read_file
from recallseg.engines.signing import PublicKey, SigningKey, check_private, read_trusted

__all__ = ["AuditKey", "create_audit_key", "read_audit_key"]

_CONTEXT = b"recallseg-audit-2\0"
_SECRET_BYTES = 32


class AuditKey(Protocol):
    """What seals an entry, and checks seals."""

    @property
    def id(self) -> str:
        """16 hex digits that tell keys apart and say nothing of a secret."""
        ...

    @property
    def seals(self) -> bool:
        """Whether it can seal; a public key only checks."""
        ...

    def seal(self, digest: str) -> str:
        """Return the seal of an entry with this digest."""
        ...

    def fits(self, digest: str, seal: str) -> bool:
        """Whether a seal is this key's and of this digest."""
        ...


class _Secret:
    seals = True

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.id = hashlib.sha256(b"recallseg-audit-key\0" + secret).hexdigest()[:16]

    def seal(self, digest: str) -> str:
        return hmac.new(self._secret, _CONTEXT + digest.encode(), hashlib.sha256).hexdigest()

    def fits(self, digest: str, seal: str) -> bool:
        return hmac.compare_digest(self.seal(digest).encode(), seal.encode())


class _Signer:
    def __init__(self, public: PublicKey, private: SigningKey | None) -> None:
        self._public, self._private = public, private
        self.id = public.id
        self.seals = private is not None

    def seal(self, digest: str) -> str:
        if self._private is None:
            raise InputError("a public key checks an audit log; sealing takes the private one.")
        return base64.b64encode(self._private.sign(_CONTEXT + digest.encode())).decode()

    def fits(self, digest: str, seal: str) -> bool:
        try:
            raw = base64.b64decode(seal, validate=True)
        except (binascii.Error, ValueError):
            return False
        return self._public.verifies(_CONTEXT + digest.encode(), raw)


def create_audit_key(path: str | Path) -> str:
    """Make a secret in a new file (0600) and return the key's id.

    Raises
    ------
    InputError
        If there is such a file, or it cannot be written.
    """
    secret = secrets.token_bytes(_SECRET_BYTES)
    try:
        create_file(Path(path), f"{secret.hex()}\n".encode(), mode=0o600)
    except OSError as error:
        raise InputError(f"the key {path} cannot be written: {error.strerror}.") from error
    return _Secret(secret).id


def read_audit_key(path: str | Path) -> AuditKey:
    """Read a secret, an Ed25519 private key, or the public line of one.

    Raises
    ------
    InputError
        If it is none, or others may read what is to be secret.
    """
    path = Path(path)
    try:
        data = read_file(path)[: 2**16]
    except OSError as error:
        raise InputError(f"the key {path} cannot be read: {error.strerror}.") from error
    if data.startswith(b"-----BEGIN"):
        private = SigningKey.read(path)
        return _Signer(private.public, private)
    if data.startswith((b"ed25519", b"#")):
        keys = read_trusted(path)
        if len(keys) > 1:
            raise InputError(f"{path} has {len(keys)} keys; an audit log is sealed by one.")
        return _Signer(keys[0], None)
    try:
        secret = bytes.fromhex(data.decode().strip())
    except ValueError:
        secret = b""
    if len(secret) < _SECRET_BYTES:
        raise InputError(
            f"{path} is no key of an audit log: expected what 'recallseg audit key' or 'recallseg "
            "sign key' wrote."
        )
    check_private(path)
    return _Secret(secret)
