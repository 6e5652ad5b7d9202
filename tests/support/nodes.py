"""A node in this process, with the fake engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recallseg.runtime.services.node.node import Node
from recallseg.runtime.services.settings import Configuration

QUIET_S = 0.3


def configured(folder: Path, library: Path, **changes: Any) -> Configuration:
    """A configuration for tests; ``changes`` are of the section ``node``, but rule and audit."""
    rule = {
        "name": "half",
        "library": library,
        "recipe": {"k": 1, "engine": "fake"},
        "destinations": list(changes.get("destinations", {})),
        **changes.pop("rule", {}),
    }
    top = {name: changes.pop(name) for name in ("audit", "rules", "metrics") if name in changes}
    node = {
        "port": 0,
        "quiet_s": QUIET_S,
        "reserve_bytes": 0,
        "retry": {"first_s": 0.2, "most_s": 0.5},
        "idle_s": 10,
        **changes,
    }
    return Configuration(state=folder / "state", node=node, **{"rules": [rule], **top})


@contextmanager
def running(configuration: Configuration, clock: Callable[[], float] = time.time) -> Iterator[Node]:
    """Start a node, and stop it."""
    node = Node(configuration, clock=clock)
    try:
        node.start()
        yield node
    finally:
        node.stop(5)
