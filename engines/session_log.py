"""Where ONNX Runtime's sessions say what they have to say: on standard error, or to a library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["configure_session_log", "send_session_logs"]

_VERBOSE, _WARNING, _ERROR = 1, 2, 3  # of ONNX Runtime's severities; 1 is "info", which is a lot
_DEBUG, _WARN = 10, 30

_sink: list[tuple[Path, int]] = []


def send_session_logs(library: Path, level: int) -> None:
    """Let sessions that are made from now on send messages to a native library.

    Parameters
    ----------
    library : exports ``RegisterCustomOps``, which gives a session its own logging function.
    level : of :mod:`logging`; warnings at least are sent, and with DEBUG all.
    """
    _sink[:] = [(library, level)]


def configure_session_log(settings: Any) -> None:
    """Set an ``onnxruntime.SessionOptions``: errors to stderr, unless a library takes messages."""
    settings.log_severity_level = _ERROR
    for library, level in _sink:
        settings.log_severity_level = (
            _VERBOSE if level <= _DEBUG else _WARNING if level <= _WARN else _ERROR
        )
        settings.register_custom_ops_library(str(library))
