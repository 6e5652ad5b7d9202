"""``recallseg igtl``: live frames in, label maps out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["igtl"]


def igtl(
    config: Annotated[
        Path,
        typer.Option("--config", help="The configuration; 'config example igtl' prints one."),
    ],
) -> None:
    """Answer OpenIGTLink frames with label maps, for navigation (extra 'igtl').

    Server, and client of a source of frames too. The newest frame wins; transforms and all other
    messages are passed on. Runs until SIGTERM or Ctrl-C.
    """
    from recallseg.runtime.services.igtl.service import Igtl
    from recallseg.runtime.services.logs import configure_logs, silence_libraries
    from recallseg.runtime.services.running import run_service
    from recallseg.runtime.services.settings import read_configuration

    configuration = read_configuration(config)
    configure_logs(configuration.log.format, configuration.log.level)
    silence_libraries()
    if not run_service(Igtl(configuration), "igtl", stop_s=configuration.stop_s):
        raise typer.Exit(1)
