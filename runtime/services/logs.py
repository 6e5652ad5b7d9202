"""What a service tells of itself: one event a line, structured, and nothing that names a patient.

An event has a fixed text and fields. Fields are numbers, names from the configuration, and marks
(:class:`Marks`) in the place of UIDs. Texts of errors may repeat what a sender wrote, so a log
names an error's kind only; the text is kept beside the data that it is about, in the state folder.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import sys
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from recallseg.engines.durable import make_folder, replace_file
from recallseg.engines.errors import InputError
from recallseg.engines.reading import read_file
from recallseg.runtime.json_text import printable

__all__ = ["Marks", "ServiceLog", "configure_logs", "silence_libraries"]

_ROOT = "recallseg.service"
_BYTES = 32


class Marks:
    """Marks that stand for identifiers: a keyed hash, so that who has no key cannot try them out.

    Parameters
    ----------
    file : where the key lies; made if there is none, readable for this user only.

    Raises
    ------
    InputError
        If the file holds no key.
    """

    def __init__(self, file: Path) -> None:
        if not file.exists():
            make_folder(file.parent)
            replace_file(file, secrets.token_bytes(_BYTES), mode=0o600)
        self._key = read_file(file)
        if len(self._key) != _BYTES:
            raise InputError(f"{file} holds no key of {_BYTES} bytes. Remove it for a new one.")

    def of(self, identifier: str) -> str:
        """Return the mark of an identifier: 32 hex digits."""
        return hmac.new(self._key, identifier.encode(), hashlib.sha256).hexdigest()[:32]


class ServiceLog:
    """The log of one service, or of a part of one."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._logger = logging.getLogger(f"{_ROOT}.{service}")

    def debug(self, event: str, **fields: Any) -> None:
        """Tell what only who looks for a fault wants to know."""
        self._tell(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Tell what was done."""
        self._tell(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Tell what was refused, put off or taken away."""
        self._tell(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Tell what somebody has to mend."""
        self._tell(logging.ERROR, event, fields)

    def _tell(self, level: int, event: str, fields: dict[str, Any]) -> None:
        told = {
            name: type(value).__name__ if isinstance(value, BaseException) else value
            for name, value in fields.items()
        }
        self._logger.log(level, event, extra={"service": self._service, "fields": told})


class _Stderr(logging.Handler):
    """Writes to what stderr is now, which who embeds a service may have replaced since."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")  # at once, or lines of threads mix
            sys.stderr.flush()
        except Exception:  # as handlers of Python do
            self.handleError(record)


class _Format(logging.Formatter):
    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """Return one line; tracebacks are left out, since they may hold what a sender wrote."""
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(
            timespec="milliseconds"
        )
        level, service = record.levelname.lower(), getattr(record, "service", record.name)
        fields = getattr(record, "fields", {})
        if self._as_json:
            line = {"time": time, "level": level, "service": service, "event": record.msg, **fields}
            return printable(json.dumps(line, default=str, ensure_ascii=False))
        told = " ".join(f"{name}={value}" for name, value in fields.items())
        return printable(f"{time} {level:7} {service}: {record.msg} {told}".rstrip())


def configure_logs(
    format: str = "json",  # as the configuration calls it
    level: str = "info",
    stream: TextIO | None = None,
) -> None:
    """Let services tell on a stream: stderr by default."""
    logger = logging.getLogger(_ROOT)
    for former in list(logger.handlers):
        logger.removeHandler(former)
    handler: logging.Handler = logging.StreamHandler(stream) if stream else _Stderr()
    handler.setFormatter(_Format(format == "json"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


def silence_libraries() -> None:
    """Let protocol libraries, readers and dying threads say nothing on stderr, for this process.

    What they say repeats what a sender wrote. A thread that dies is told by the kind of its error.
    """
    log = ServiceLog("service")
    logging.captureWarnings(True)
    for name in ("py.warnings", "pynetdicom", "pydicom", "dicomweb_client", "urllib3"):
        logger = logging.getLogger(name)
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
    threading.excepthook = lambda died: log.error("a thread died", error=died.exc_value)


def process_fields() -> dict[str, Any]:
    """Return what a start tells: version and process."""
    from recallseg import __version__

    return {"version": __version__, "process": os.getpid()}
