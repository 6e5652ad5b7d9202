"""``recallseg serve``: people propose from a library, correct, and accept into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from recallseg.commands.asking import Asking, grouped
from recallseg.commands.common import (
    AuditHeadOption,
    AuditKeyOption,
    AuditOption,
    LibraryArgument,
    note,
    open_audit,
    say_notice,
)

__all__ = ["serve"]

PORT = 1527
MIB = 1 << 20


@grouped
def serve(
    library: LibraryArgument,
    asking: Asking,
    folder: Annotated[
        Optional[Path], typer.Option(help="Folder of images that wait to be annotated.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = PORT,
    user: Annotated[
        Optional[list[str]],
        typer.Option("--user", help="Name of a person, with a token of their own; again for more."),
    ] = None,
    token: Annotated[
        Optional[str],
        typer.Option(
            envvar="RECALLSEG_TOKEN",
            help="The token, where there is one person; at least 16 characters.",
            show_default="a new one",
        ),
    ] = None,
    target: Annotated[
        Optional[str],
        typer.Option(help="Structure that nnInteractive's clients work on.", show_default="first"),
    ] = None,
    certificate: Annotated[
        Optional[Path], typer.Option(help="PEM file with the certificate, for HTTPS.")
    ] = None,
    key: Annotated[Optional[Path], typer.Option(help="PEM file with its private key.")] = None,
    allow_host: Annotated[
        Optional[list[str]], typer.Option("--allow-host", help="Name that this server has.")
    ] = None,
    allow_origin: Annotated[
        Optional[list[str]],
        typer.Option("--allow-origin", help="Other pages that may use it: https://HOST."),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Beyond this machine without HTTPS: behind a proxy that has."),
    ] = False,
    sessions: Annotated[int, typer.Option(min=1, help="Sessions at once.")] = 32,
    request_mb: Annotated[int, typer.Option(min=1, help="MiB of one request.")] = 512,
    image_mb: Annotated[int, typer.Option(min=1, help="MiB of one image, unpacked.")] = 1024,
    memory_mb: Annotated[int, typer.Option(min=1, help="MiB of all open images and masks.")] = 4096,
    idle: Annotated[float, typer.Option(min=1, help="Seconds until an idle session ends.")] = 600.0,
    audit: AuditOption = None,
    audit_key: AuditKeyOption = None,
    audit_head: AuditHeadOption = None,
) -> None:
    """Serve a library to people: a page, nnInteractive's clients (napari, 3D Slicer), an API.

    Nothing is written to the library before a person accepts it. Each accept is recorded in the
    audit log, LIB.audit.jsonl unless told otherwise. Stop it with Ctrl-C or SIGTERM.
    """
    from recallseg.runtime.library import Library
    from recallseg.runtime.services.http.limits import Limits
    from recallseg.runtime.services.http.serving import Access, open_server
    from recallseg.runtime.services.logs import configure_logs
    from recallseg.runtime.services.running import run_service

    asking.check()
    configure_logs("text")
    limits = Limits(
        sessions=sessions,
        body_bytes=request_mb * MIB,
        image_bytes=image_mb * MIB,
        total_bytes=memory_mb * MIB,
        idle_s=idle,
    )
    access = Access.of(
        user or [],
        token,
        host=host,
        hosts=allow_host or [],
        origins=allow_origin or [],
        certificate=certificate,
        key=key,
        plain=plain,
    )
    with Library.open(
        library,
        mode="write",
        engine=asking.engine,  # what is accepted is encoded as what is asked
        precision=asking.precision,
        threads=asking.threads,
    ) as opened:
        log = open_audit(  # only now: it is made where there is none
            audit or library.with_name(f"{library.name}.audit.jsonl"), audit_key, audit_head
        )
        assert log is not None  # there was a path
        server = open_server(
            opened,
            log,
            access,
            port=port,
            limits=limits,
            target=target,
            folder=folder,
            segmenter=asking.segmenter,
        )
        say_notice(opened.bundle.notice)

        def ready() -> None:
            for name, secret in access.tokens.items():
                note(f"{name}: open {server.url}/#token={secret}")
                note(f"{name}: token (API key of nnInteractive's clients): {secret}")

        run_service(server, "serve", ready=ready)
