"""Certificates and keys for TLS: what is wrong with one is told by the file that it is of."""

from __future__ import annotations

import ssl
from pathlib import Path

from recallseg.engines.errors import InputError
from recallseg.engines.reading import read_file

__all__ = ["load_certificates"]


def load_certificates(
    context: ssl.SSLContext,
    certificate: Path | None = None,
    key: Path | None = None,
    authorities: Path | None = None,
) -> ssl.SSLContext:
    """Load PEM files into a context, and return it.

    Parameters
    ----------
    certificate, key : of this side; the key may be in the certificate's file.
    authorities : whose certificates the other side's must be of.

    Raises
    ------
    InputError
        If one cannot be read, is none, or does not belong to the other, or if the key is encrypted:
        nobody is there to be asked for its passphrase.
    """
    for file in (certificate, key, authorities):
        if file is not None:
            try:
                read_file(file)
            except OSError as error:
                raise InputError(f"{file} cannot be read: {error.strerror}.") from error
    private = key or certificate

    def ask() -> str:
        raise InputError(
            f"the key in {private} is encrypted, and a service cannot ask for its passphrase. "
            "Decrypt it (openssl pkey), and let its owner alone read it."
        )

    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key, password=ask)
        except ssl.SSLError as error:
            raise InputError(
                f"the certificate {certificate} with the key in {private} cannot be used: {error}. "
                "Give PEM files that belong together."
            ) from error
    if authorities is not None:
        try:
            context.load_verify_locations(authorities)
        except ssl.SSLError as error:
            raise InputError(
                f"{authorities} holds no certificate of an authority: {error}. Give a PEM file."
            ) from error
    return context
