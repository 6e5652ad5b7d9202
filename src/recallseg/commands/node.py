"""``recallseg node``: a DICOM node, and what people see and mend of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from recallseg.commands.common import JsonOption, emit_json, note, say

if TYPE_CHECKING:
    from recallseg.runtime.services.node.store import NodeStore

__all__ = ["app"]

app = typer.Typer(
    invoke_without_command=True,
    help="Run a DICOM node: series in by C-STORE, segmentations out (extra 'node').",
)
ConfigOption = Annotated[
    Path, typer.Option("--config", help="The configuration; 'config example node' prints one.")
]
SeriesOption = Annotated[
    Optional[str], typer.Option("--series", help="Of one series, by its mark; else of all.")
]


@app.callback()
def node(
    ctx: typer.Context,
    config: Annotated[
        Optional[Path],
        typer.Option("--config", help="The configuration; 'config example node' prints one."),
    ] = None,
) -> None:
    """Receive series, segment them as rules say, and send the answers on.

    Runs until SIGTERM or Ctrl-C, and then stops within stop_s. Whatever is killed at whatever
    moment: what was acknowledged is answered after the next start.
    """
    if ctx.invoked_subcommand is not None:
        if config is not None:
            raise typer.BadParameter("give --config after the subcommand.", param_hint="--config")
        return
    if config is None:
        raise typer.BadParameter("name the configuration.", param_hint="--config")
    from recallseg.runtime.services.logs import configure_logs, silence_libraries
    from recallseg.runtime.services.node.node import Node
    from recallseg.runtime.services.running import run_service
    from recallseg.runtime.services.settings import read_configuration

    configuration = read_configuration(config)
    configure_logs(configuration.log.format, configuration.log.level)
    silence_libraries()
    service = Node(configuration)
    if not run_service(service, "node", stop_s=configuration.stop_s):
        raise typer.Exit(1)


@app.command()
def status(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Tell how many series, jobs and deliveries are in which state, and what is in trouble."""
    with _store(config) as store:
        counts, troubles = store.counts(), store.troubles()
    if as_json:
        emit_json({"schema": "recallseg-node-status/1", "counts": counts, "troubles": troubles})
        return
    for table, states in counts.items():
        told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        say(f"{table}: {told or 'none'}")
    _tell(troubles)


@app.command()
def retry(config: ConfigOption, series: SeriesOption = None, as_json: JsonOption = False) -> None:
    """Try again, now, what failed or waits: decisions, segmentations, deliveries."""
    with _store(config) as store:
        count = store.retry(series)
    if as_json:
        emit_json({"retried": count})
    else:
        say(f"{count} to be tried again")


@app.command()
def quarantine(
    config: ConfigOption,
    remove: Annotated[
        Optional[str],
        typer.Option("--remove", metavar="SERIES", help="Delete a series and what was made of it."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the series that are set aside, with reasons, or delete one of them for good.

    Set aside is what no rule fits, what came too late to be whole, and what cannot be read or
    segmented. It is kept until it is mended ('node retry') or deleted.
    """
    with _store(config) as store:
        if remove is not None:
            count = store.remove(remove)
            if as_json:
                emit_json({"removed": remove, "objects": count})
            else:
                note(f"deleted {count} objects")
            return
        aside = [
            each
            for each in store.troubles()
            if each["state"] in ("unmatched", "incomplete", "unreadable", "not segmented")
        ]
        for each in aside:
            each["objects"] = [str(file) for file in store.files(each["series"])]
    if as_json:
        emit_json(aside)
    else:
        _tell(aside)


@contextmanager
def _store(config: Path) -> Iterator[NodeStore]:
    from recallseg.engines.errors import InputError
    from recallseg.runtime.services.node.database import naming_the_state
    from recallseg.runtime.services.node.store import NodeStore
    from recallseg.runtime.services.settings import read_configuration

    state = read_configuration(config).state
    if state is None:
        raise InputError(f"{config} names no state folder.")
    with naming_the_state(state), NodeStore(state, running=False) as store:
        yield store


def _tell(troubles: list[dict[str, object]]) -> None:
    for each in troubles:
        since = datetime.fromtimestamp(float(str(each["since"]))).isoformat(" ", "seconds")
        where = each.get("rule") or each.get("destination") or ""
        say(f"{since}  {each['series']}  {where}  {each['state']}: {each['why']}")
