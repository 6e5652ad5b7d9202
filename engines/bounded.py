"""Verification with an end: what strangers made runs in a process of its own, in bounds.

A legal graph may still be enormous, and native code that multiplies its matrices hears no signal.
The system ends it: RLIMIT_AS for memory, and its parent's clock for time.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from recallseg.engines import errors
from recallseg.engines.bundle import Bundle
from recallseg.engines.child import bound_process, ending, python_command, python_environment
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import (
    DeadlineError,
    EngineRunError,
    HostMemoryError,
    InputError,
    RecallSegError,
)
from recallseg.engines.registry import check_choice, engine_class, load_engines
from recallseg.engines.verification import Check, Verification, verify_engines

__all__ = [
    "MOST_SECONDS",
    "default_memory",
    "verify_bounded",
]

MOST_SECONDS = 600.0
"""Ten minutes: far above what a bundle takes on a small board, far below a night."""

_LONGEST_TIME = 1_000_000
"""Seconds; the system waits no longer than some weeks."""

_MOST_MEMORY = 16 << 30
"""Above what the largest SAM 2 with the largest DINOv2 holds in fp32 (see engines/budget.py)."""

_LONGEST = 20_000  # characters of a message


def default_memory() -> int:
    """Return the memory of this machine in bytes, at most 16 GiB."""
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _MOST_MEMORY)


def verify_bounded(
    bundle: Bundle,
    engine: str,
    precision: str,
    options: EngineOptions | None = None,
    *,
    most_memory: int | None = None,
    most_seconds: float = MOST_SECONDS,
) -> Verification:
    """Load a bundle's engines in a process of its own, compare with its golden tensors, and report.

    Parameters
    ----------
    bundle : opened; the other process opens it again.
    engine, precision, options : as for :func:`recallseg.engines.registry.load_engines`.
    most_memory : bytes of addresses that graphs may take there, on top of what Python and ONNX
        Runtime have taken before; None: :func:`default_memory` for engines on the CPU. Drivers of
        GPUs reserve addresses without measure, so engines on a device have no such limit.
    most_seconds : from the start of the process to its answer.

    Raises
    ------
    InputError
        If a limit is not positive, or ``most_memory`` is given for an engine on a device.
    HostMemoryError
        If it needs more memory.
    DeadlineError
        If it takes longer.
    EngineRunError
        If the process was ended by a signal: native code crashed.
    RecallSegError
        As ``load_engines`` and ``verify_engines`` raise it.
    """
    options = options or EngineOptions()
    on_cpu = check_choice(engine, precision, options.threads).place == "host"
    if most_memory is not None and not on_cpu:
        raise InputError(
            f"the memory of engine '{engine}' cannot be limited: the driver of a GPU reserves "
            "addresses without measure. Leave the limit out; the time is limited all the same."
        )
    if not 0 < most_seconds <= _LONGEST_TIME or (most_memory is not None and most_memory <= 0):
        raise InputError(
            f"limits must be above 0, and the time at most {_LONGEST_TIME:,} s; got {most_memory} "
            f"bytes and {most_seconds} s."
        )
    memory = (most_memory or default_memory()) if on_cpu else None
    question = {
        "parent": os.getpid(),
        "bundle": str(bundle.path),
        "identity": bundle.identity,
        "engine": engine,
        "precision": precision,
        "threads": options.threads,
        "memory": memory,
    }
    command = python_command(__name__, json.dumps(question))
    # Each thread's arena reserves 64 MiB of addresses, which are what is counted here.
    environment = {**python_environment(), "MALLOC_ARENA_MAX": "2"}
    with subprocess.Popen(  # noqa: S603  # this Python, this module
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment
    ) as process:
        try:
            answer, _ = process.communicate(timeout=most_seconds)
        except subprocess.TimeoutExpired:
            raise DeadlineError(
                f"bundle {bundle.name} was not verified within {most_seconds:g} s, and was "
                "stopped. Graphs of a stranger may be made to take for ever; where these are meant "
                "to be so slow, allow them more time (--most-seconds)."
            ) from None
        finally:
            process.kill()
    limit = "" if memory is None else f"{memory / 2**30:.3g} GiB"
    if process.returncode < 0:
        name = ending(process.returncode)
        raise EngineRunError(
            f"bundle {bundle.name} was not verified: its process was ended by {name}. "
            f"A graph made it crash{f', or need more than {limit} of memory' if limit else ''}. "
            "Use no such bundle of an unknown maker; if it is your own, allow it more memory "
            "(--most-memory), and report it if that is no help."
        )
    return _read(bundle, answer, limit)


def _read(bundle: Bundle, answer: bytes, limit: str) -> Verification:
    try:
        found: dict[str, Any] = json.loads(answer)
    except ValueError:
        raise EngineRunError(
            f"bundle {bundle.name} was not verified: its process ended without an answer."
        ) from None
    if "memory" in found:
        raise HostMemoryError(
            f"bundle {bundle.name} was not verified: its graphs need more than {limit} of memory "
            f"({found['memory']}). Where they are meant to be so large, allow them more "
            "(--most-memory)."
        )
    if "error" in found:
        raise getattr(errors, found["error"])(found["message"])
    checks = tuple(Check(name, float(error), limit) for name, error, limit in found["checks"])
    return Verification(found["engine"], found["precision"], checks)


def main() -> None:
    """Answer one question on the command line, on what was standard output, as JSON."""
    question = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    if not bound_process(question["parent"], None):
        return
    try:
        found = _verify(question)
    except MemoryError:
        found = {"memory": "Python"}
    except RecallSegError as error:
        text = " ".join(str(error)[:_LONGEST].split())
        known = isinstance(error, HostMemoryError)
        found = {"memory": text} if known else {"error": type(error).__name__, "message": text}
    json.dump(found, answers)
    answers.close()
    os._exit(0)  # destructors of native code have nothing to say any more


def _verify(question: Mapping[str, Any]) -> dict[str, Any]:
    engine, precision = question["engine"], question["precision"]
    check_choice(engine, precision, question["threads"])  # imports the engine
    bundle = Bundle.open(question["bundle"])
    if bundle.identity != question["identity"]:
        raise EngineRunError(f"bundle {bundle.path} was changed while it was verified. Try again.")
    if question["memory"] is not None:
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        most = taken + question["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    engines = load_engines(
        bundle,
        engine,
        precision,
        options=EngineOptions(question["threads"]),
        graphs=bundle.graphs_for(engine_class(engine).variants, precision),
    )
    result = verify_engines(bundle, engines, precision, strict=False)
    return {
        "engine": result.engine,
        "precision": result.precision,
        "checks": [[check.tensor, check.error, check.tolerance] for check in result.checks],
    }
