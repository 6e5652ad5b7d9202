"""The section ``node`` of a configuration."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal, Optional, Union

from pydantic import AfterValidator, Field, model_validator

from recallseg.engines.errors import InputError
from recallseg.engines.reading import read_text
from recallseg.runtime.services.certificates import load_certificates
from recallseg.runtime.services.sections import Host, Listening, Place, Port, Seconds, Section

if TYPE_CHECKING:
    from recallseg.runtime.services.settings import Configuration

__all__ = [
    "CommitmentSettings",
    "Destination",
    "DicomDestination",
    "NodeSettings",
    "RetrySettings",
    "Sender",
    "StowDestination",
    "Tls",
]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _ae_title(text: str) -> str:
    text = text.strip(" ")
    if not (1 <= len(text) <= 16 and text.isascii() and text.isprintable() and "\\" not in text):
        raise ValueError("an AE title has 1 to 16 printable ASCII characters and no backslash")
    return text


AeTitle = Annotated[str, AfterValidator(_ae_title)]
Bytes = Annotated[int, Field(ge=1)]


class Tls(Section):
    """TLS with certificates on both sides.

    Attributes
    ----------
    certificate, key : of this side, PEM.
    authorities : PEM of the authorities that the other side's certificate must be of.
    """

    certificate: Place
    key: Place
    authorities: Place

    def server(self) -> ssl.SSLContext:
        """Return the context of a server that asks for a client's certificate.

        Raises
        ------
        InputError
            As :func:`recallseg.runtime.services.certificates.load_certificates` says.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        return self._filled(context)

    def client(self) -> ssl.SSLContext:
        """Return the context of a client; the server's name must be in its certificate."""
        return self._filled(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def _filled(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return load_certificates(context, self.certificate, self.key, self.authorities)


class Sender(Section):
    """Who may send, by its calling AE title; its address is needed for storage commitment only."""

    ae_title: AeTitle
    host: Optional[Host] = None
    port: Optional[Port] = None
    tls: Optional[Tls] = None


class DicomDestination(Section):
    """Where answers go by C-STORE.

    Attributes
    ----------
    calling : AE title that we call ourselves; None for the node's own.
    commitment : ask for storage commitment, and count as done only what was committed.
    commitment_s : seconds to wait for the report before asking again.
    """

    type: Literal["dicom"]
    host: Host
    port: Annotated[int, Field(ge=1, le=65535)]
    ae_title: AeTitle
    calling: Optional[AeTitle] = None
    tls: Optional[Tls] = None
    timeout_s: Seconds = 30.0
    commitment: bool = False
    commitment_s: Seconds = 3600.0


class StowDestination(Section):
    """Where answers go by STOW-RS (PS3.18).

    Attributes
    ----------
    url : of the DICOMweb service, e.g. ``https://pacs/dicom-web``.
    user, password_file : HTTP basic authentication.
    token_file : holds a bearer token; read for each request, so that it may be renewed.
    authorities, certificate, key : PEM files for TLS; None for the system's authorities, and no
        certificate of our own.
    """

    type: Literal["stow-rs"]
    url: Annotated[str, Field(pattern=r"^https?://[^\s]+$")]
    user: Optional[str] = None
    password_file: Optional[Place] = None
    token_file: Optional[Place] = None
    authorities: Optional[Place] = None
    certificate: Optional[Place] = None
    key: Optional[Place] = None
    timeout_s: Seconds = 30.0

    @model_validator(mode="after")
    def _goes_together(self) -> StowDestination:
        """Refuse what would be left out without a word."""
        if (self.user is None) is not (self.password_file is None):
            raise ValueError("user and password_file go together")
        if self.user is not None and self.token_file is not None:
            raise ValueError("give a user with password_file, or token_file, not both")
        if self.key is not None and self.certificate is None:
            raise ValueError("a key goes with its certificate")
        return self

    def problems(self) -> Iterable[str]:
        """Yield what is wrong with the files that it names, a sentence each."""
        for file in (self.password_file, self.token_file):
            if file is not None:
                try:
                    if not read_text(file).strip():
                        yield f"{file} is empty"
                except OSError as error:
                    yield f"{file} cannot be read: {error.strerror}"
                except ValueError:
                    yield f"{file} is no text"
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            load_certificates(context, self.certificate, self.key, self.authorities)
        except InputError as error:
            yield str(error)


Destination = Annotated[Union[DicomDestination, StowDestination], Field(discriminator="type")]


class RetrySettings(Section):
    """How what could not be sent is tried again: after ``first_s``, then twice as long each time.

    After ``give_up_hours`` it is kept and listed, and waits for ``recallseg node retry``.
    """

    first_s: Seconds = 2.0
    most_s: Seconds = 300.0
    give_up_hours: Annotated[float, Field(gt=0)] = 72.0


class CommitmentSettings(Section):
    """Storage commitment for senders: what was committed is kept ``keep_days``, not ``keep_hours``.

    A node is no archive: commit only for senders that know it.
    """

    keep_days: Annotated[float, Field(gt=0)] = 365.0


class NodeSettings(Listening):
    """A DICOM node.

    Attributes
    ----------
    ae_title : that senders must call.
    senders : who may send; empty for anybody who can reach the port.
    tls : None for none.
    quiet_s : a series is complete when its associations have ended and so many seconds passed
        since the last object.
    most_object_bytes, most_pdu_bytes : of what is received.
    quota_bytes : of all that the node keeps; more is refused (A700).
    reserve_bytes : that must stay free on the disk; else refused (A700).
    keep_hours : what was received, and answers, are kept so long after all is done.
    destinations : where answers can go, by name.
    commitment : None: senders are not offered it.
    """

    port: Port = 11112
    ae_title: AeTitle = "RECALLSEG"
    senders: tuple[Sender, ...] = ()
    tls: Optional[Tls] = None
    quiet_s: Seconds = 5.0
    most_object_bytes: Bytes = 2**31
    most_pdu_bytes: Annotated[int, Field(ge=4096, le=2**24)] = 2**18
    quota_bytes: Bytes = 50 * 10**9
    reserve_bytes: Annotated[int, Field(ge=0)] = 10**9
    keep_hours: Annotated[float, Field(gt=0)] = 24.0
    retry: RetrySettings = RetrySettings()
    destinations: dict[str, Destination] = Field(default_factory=dict)
    commitment: Optional[CommitmentSettings] = None

    def problems(self, whole: Configuration) -> Iterable[str]:
        """Yield what is wrong with what the section names, a sentence each."""
        if whole.state is None:
            yield "state: a node needs a folder to keep what it received"
        if not whole.rules:
            yield "rules: there is none, so nothing would be segmented"
        for rule in whole.rules:
            if not rule.destinations:
                yield f"rule '{rule.name}' names no destination, so its answers would go nowhere"
        if self.host not in LOOPBACK and self.tls is None and not self.senders:
            yield f"node.host: on {self.host}, without tls or senders, anybody may send"
        for where, tls in (("node.tls", self.tls), *_tls_of(self)):
            if tls is not None:
                try:
                    tls.server()
                except InputError as error:
                    yield f"{where}: {error}"
        for name, destination in self.destinations.items():
            if isinstance(destination, StowDestination):
                for problem in destination.problems():
                    yield f"node.destinations.{name}: {problem}"


def _tls_of(node: NodeSettings) -> Iterable[tuple[str, Optional[Tls]]]:
    for name, destination in node.destinations.items():
        if isinstance(destination, DicomDestination):
            yield f"node.destinations.{name}.tls", destination.tls
    for sender in node.senders:
        yield f"node.senders ({sender.ae_title}).tls", sender.tls
