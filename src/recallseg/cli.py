"""The ``recallseg`` command: mounts each room's commands, and turns errors into one message.

Help and completion import no engine and no torch: the runtime's command modules are light, and the
other rooms' are imported only when they are called.

Exit status: 0 done, 1 could not, 2 called wrongly, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from recallseg import __version__
from recallseg.commands.archive import archive
from recallseg.commands.audit import app as audit_app
from recallseg.commands.build import build
from recallseg.commands.cache import app as cache_app
from recallseg.commands.choosing import next_
from recallseg.commands.common import INTERRUPTED, forget_notices, note
from recallseg.commands.config import app as config_app
from recallseg.commands.demo import demo
from recallseg.commands.doctor import doctor
from recallseg.commands.evaluate import evaluate
from recallseg.commands.identifiers import anonymise, whois
from recallseg.commands.igtl import igtl
from recallseg.commands.importing import import_
from recallseg.commands.keeping import (
    backup,
    history,
    merge,
    reinstate,
    rename,
    restore,
    retire,
)
from recallseg.commands.library import app as library_app
from recallseg.commands.mrd import mrd
from recallseg.commands.node import app as node_app
from recallseg.commands.releasing import diff, install, release
from recallseg.commands.reproduce import reproduce
from recallseg.commands.reverting import revert
from recallseg.commands.segment import segment
from recallseg.commands.serve import serve
from recallseg.commands.sign import app as sign_app
from recallseg.commands.verify import verify
from recallseg.commands.watch import watch
from recallseg.engines.errors import RecallSegError
from recallseg.engines.signing import TRUST

__all__ = ["app", "main"]

DEBUG = "--debug"

EXTRAS = {
    "onnxruntime": "cpu",
    "torch": "export",
    "transformers": "export",
    "safetensors": "export",
    "onnx": "export",
    "onnxscript": "export",
    "scipy": "evaluate",
    "sklearn": "fit",
    "nibabel": "medical",
    "highdicom": "medical",
    "nrrd": "medical",
    "pydicom": "medical",
    "nilearn": "demo",
    "cryptography": "signing",
    "cyclonedx": "sbom",
    "packageurl": "sbom",
    "packaging": "sbom",
    "prometheus_client": "services",
    "pydantic": "services",
    "pydantic_settings": "services",
    "pynetdicom": "node",
    "blosc2": "serve",
    "fastapi": "serve",
    "uvicorn": "serve",
    "dicomweb_client": "node",
    "fsspec": "archive",
    "pyarrow": "archive",
    "ray": "ray",
}
"""Which extra brings a package that may be missing."""


class Root(TyperGroup):
    """The command group that reports every error as one message on stderr."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take ``--debug`` wherever it stands, as long as it is before ``--``.

        An empty argument is refused: as a path it would be the folder that one is in, and as a
        digest or name none was asked for.
        """
        end = args.index("--") if "--" in args else len(args)
        empty = "" in args or next((a for a in args[:end] if re.fullmatch("--[a-z-]+=", a)), "")
        if empty:
            what = "an argument" if empty is True else f"the value of {empty[:-1]}"
            ctx.fail(f"{what} is empty. Give it a value, or leave it out; is a variable not set?")
        if DEBUG in args[:end]:
            args = [DEBUG, *(arg for i, arg in enumerate(args) if arg != DEBUG or i > end)]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error becomes a message and an exit status."""
        forget_notices()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read our output has gone; Python would complain once more when it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (RecallSegError, ModuleNotFoundError, OSError, MemoryError) as error:
            if ctx.params.get("debug"):
                raise
            note(f"recallseg: {_message(error)}")
            raise typer.Exit(1) from None


def _message(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").partition(".")[0]
        extra = EXTRAS.get(name)
        if extra is not None:
            return (
                f"this needs recallseg[{extra}]: the package '{name}' is not installed. "
                f"pip install 'recallseg[{extra}]'"
            )
        return f"the package '{error.name}' is not installed: {error}"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, MemoryError):
        return (
            f"out of memory{f': {error}' if str(error) else ''}. Use a smaller image, k or bundle."
        )
    return str(error) or type(error).__name__


app = typer.Typer(
    cls=Root,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Segment medical images by recalling annotated ones: annotate a few, segment the rest.",
    epilog="Exit status: 0 done, 1 could not, 2 called wrongly.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"recallseg {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show a traceback when something fails.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    trust: Annotated[
        Optional[Path],
        typer.Option(
            "--trust",
            metavar="KEYS",
            help="File of public keys: open only bundles that one of them signed. "
            "Also $RECALLSEG_TRUST.",
        ),
    ] = None,
) -> None:
    """Hold the options that every command takes."""
    if trust is not None:
        before = os.environ.get(TRUST, "")
        os.environ[TRUST] = str(trust.absolute())  # for every way to a bundle, and child processes
        ctx.call_on_close(lambda: os.environ.__setitem__(TRUST, before))


LAZY: dict[str, tuple[str, str]] = {}
"""Where commands are whose modules are imported when they are called: module and attribute."""


def lazy_command(name: str) -> Any:
    """Import the command that a stand-in of this name stands for."""
    module, attribute = LAZY[name]
    found = getattr(importlib.import_module(module), attribute)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    real = typer.Typer(add_completion=False)
    real.command(name)(found)
    return typer.main.get_command(real)


def _mount_lazily(name: str, module: str, attribute: str, summary: str) -> None:
    """Mount a command whose module may import something heavy, or something that is not installed.

    What stands in for it takes every argument as it comes, imports the module and hands them on.
    """
    LAZY[name] = (module, attribute)

    def stand_in(ctx: typer.Context) -> None:
        command = lazy_command(name)
        status = command.main(args=ctx.args, prog_name=ctx.command_path, standalone_mode=False)
        if isinstance(status, int) and status:
            raise typer.Exit(status)

    stand_in.__doc__ = summary
    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    app.command(name, context_settings=settings, add_help_option=False)(stand_in)


app.command()(demo)
library_app.command("import")(import_)
library_app.command()(revert)
library_app.command()(whois)
library_app.command()(anonymise)
library_app.command("next")(next_)
library_app.command("diff")(diff)
for _command in (release, install, retire, reinstate, rename, merge, backup, restore, history):
    library_app.command()(_command)
app.add_typer(library_app, name="library")
app.command()(segment)
app.command()(archive)
app.command()(watch)
app.command()(serve)
app.command()(evaluate)
app.command()(reproduce)
app.command()(build)
app.command()(verify)
app.add_typer(cache_app, name="cache")
app.add_typer(audit_app, name="audit")
app.add_typer(sign_app, name="sign")
app.add_typer(config_app, name="config")
app.add_typer(node_app, name="node")
app.command()(mrd)
app.command()(igtl)
app.command()(doctor)
_mount_lazily(
    "export",
    "recallseg.export.commands",
    "export",
    "Make a bundle from checkpoints, and prove it against PyTorch (extra 'export').",
)
_mount_lazily(
    "convert",
    "recallseg.export.commands",
    "convert",
    "Add precisions to a bundle, each held to its tolerance (extra 'export').",
)
_mount_lazily(
    "export-triton",
    "recallseg.export.triton.commands",
    "export_triton_command",
    "Write a Triton model repository from a bundle.",
)
_mount_lazily(
    "bench",
    "recallseg.benchmarks.commands",
    "bench",
    "Measure latency, memory and quality on this machine.",
)
_mount_lazily(
    "sbom",
    "recallseg.commands.sbom",
    "sbom",
    "Write a bill of materials of all that is installed and linked (extra 'sbom').",
)


def main() -> None:
    """Run the command line; a defect of RecallSeg itself is one message too."""
    try:
        app(prog_name="recallseg")
    except Exception as error:
        if DEBUG in sys.argv:
            raise
        kind = type(error).__name__
        note(f"recallseg: defect, please report it with the output of {DEBUG}: {kind}: {error}")
        sys.exit(1)
