"""``recallseg mrd``: inline reconstruction's images in, masks out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from recallseg.commands.common import emit_json, note

__all__ = ["mrd"]


def mrd(
    config: Annotated[
        Optional[Path],
        typer.Option("--config", help="The configuration; 'config example mrd' prints one."),
    ] = None,
    record: Annotated[
        Optional[Path],
        typer.Option("--record", help="Keep what arrives in this folder, without identifiers."),
    ] = None,
    openrecon: Annotated[
        Optional[Path],
        typer.Option(
            "--openrecon",
            metavar="OUT",
            help="Write what an OpenRecon image is built from into this new folder, and end.",
        ),
    ] = None,
    replay: Annotated[
        Optional[Path],
        typer.Option("--replay", metavar="FILE", help="Send a recording to a service, and end."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Of the service, for --replay.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Of the service, for --replay.")
    ] = 9002,
) -> None:
    """Answer MRD streams as FIRE, OpenRecon and Gadgetron speak them (extra 'mrd').

    Images are passed on at once; masks, overlays and contours follow as series of their own. An
    image that takes too long is passed on alone. Runs until SIGTERM or Ctrl-C.
    """
    from recallseg.engines.errors import InputError

    ways = {"--replay": replay, "--openrecon": openrecon, "--record": record}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"{' and '.join(given)} exclude each other.", param_hint=[])
    if replay is not None:
        from recallseg.runtime.services.mrd.recording import replay as send

        emit_json(send(replay, host, port))
        return
    if config is None:
        raise typer.BadParameter("name the configuration.", param_hint="--config")
    from recallseg.runtime.services.settings import read_configuration

    configuration = read_configuration(config)
    if openrecon is not None:
        from recallseg.runtime.services.mrd.openrecon import write_openrecon

        for file in write_openrecon(configuration, openrecon):
            note(f"written {file}")
        return
    from recallseg.runtime.services.logs import configure_logs, silence_libraries
    from recallseg.runtime.services.mrd.service import Mrd
    from recallseg.runtime.services.running import run_service

    if record is not None:
        if configuration.mrd is None:
            raise InputError("--record needs a section [mrd] in the configuration.")
        section = configuration.mrd.model_copy(update={"record": record.absolute()})
        configuration = configuration.model_copy(update={"mrd": section})
    configure_logs(configuration.log.format, configuration.log.level)
    silence_libraries()
    if not run_service(Mrd(configuration), "mrd", stop_s=configuration.stop_s):
        raise typer.Exit(1)
