"""A library served: the pieces put together, as ``recallseg serve`` does."""

from __future__ import annotations

import getpass
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recallseg.engines.errors import InputError
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.library import Library
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.http.application import make_application
from recallseg.runtime.services.http.desk import Desk
from recallseg.runtime.services.http.guard import make_token
from recallseg.runtime.services.http.limits import Limits
from recallseg.runtime.services.http.server import AnnotationServer, is_loopback
from recallseg.runtime.services.http.worklist import Worklist

__all__ = ["Access", "open_server"]

SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class Access:
    """Who may use a server, and from where. Make it with :meth:`of`, which checks.

    Attributes
    ----------
    tokens : by name of the person.
    host : address to listen on.
    hosts, origins : see :class:`recallseg.runtime.services.http.guard.Guard`.
    certificate, key : PEM files for HTTPS.
    """

    tokens: Mapping[str, str]
    host: str = "127.0.0.1"
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def of(
        cls,
        users: Sequence[str] = (),
        token: str | None = None,
        *,
        host: str = "127.0.0.1",
        hosts: Collection[str] = (),
        origins: Collection[str] = (),
        certificate: Path | None = None,
        key: Path | None = None,
        plain: bool = False,
    ) -> Access:
        """Make tokens, and check that they are not sent in the clear over a network.

        Parameters
        ----------
        users : names of people; none for the one that the program runs as.
        token : of the only one; None for a new one.
        plain : allow plain HTTP beyond this machine, where a proxy in front has TLS.

        Raises
        ------
        InputError
        """
        names = [*users] or [_own_name()]
        if len(set(names)) < len(names) or not all(name.strip() for name in names):
            raise InputError(f"users must have distinct names, got {', '.join(names)}.")
        if token is not None and len(names) > 1:
            raise InputError("a token can be given for one user only; leave it out for several.")
        if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii()):
            raise InputError(
                f"a token must be at least {SHORTEST_TOKEN} ASCII characters that nobody guesses."
            )
        if key is not None and certificate is None:
            raise InputError("a key without its certificate is no use: give both for HTTPS.")
        if certificate is None and not plain and not is_loopback(host):
            raise InputError(
                f"on {host} tokens and images would cross the network in the clear. Give a "
                "certificate (--certificate, --key), or say --plain behind a proxy that has one."
            )
        return cls(
            FrozenMap({name: token or make_token() for name in names}),
            host,
            (host, *hosts),
            tuple(origins),
            certificate,
            key,
        )


def open_server(
    library: Library,
    audit: AuditLog,
    access: Access,
    *,
    port: int = 1527,
    limits: Limits | None = None,
    target: str | None = None,
    folder: Path | None = None,
    segmenter: Callable[..., Segmenter] = Segmenter,
) -> AnnotationServer:
    """Return a server of a library that is open for writing; start it, or use ``with``.

    Parameters
    ----------
    audit : where every accept and every other change is recorded.
    port : 0 lets the system choose.
    target : structure that nnInteractive's clients work on; None for the library's first.
    folder : of images that wait to be annotated.
    segmenter : makes one of the library.

    Raises
    ------
    LibraryWriteError
        If the library is open for reading only.
    OutputError
        If the port is taken.
    InputError
    """
    library.check_writable("accept")
    limits = limits or Limits()
    desk = Desk(library, audit, segmenter)
    worklist = None if folder is None else Worklist(folder, library, audit)
    application = make_application(
        desk,
        {token: name for name, token in access.tokens.items()},
        limits=limits,
        hosts=access.hosts,
        origins=access.origins,
        target=target,
        worklist=worklist,
    )
    return AnnotationServer(
        application,
        access.host,
        port,
        limits=limits,
        certificate=access.certificate,
        key=access.key,
    )


def _own_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # of a container's user without a name
        return "owner"
