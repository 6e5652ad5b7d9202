"""A server in this process for tests, on a small library of the demo bundle, and its pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from recallseg.runtime.library import Library
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.http.application import make_application
from recallseg.runtime.services.http.desk import Desk
from recallseg.runtime.services.http.limits import Limits
from recallseg.runtime.services.http.server import AnnotationServer
from recallseg.runtime.services.http.worklist import Worklist

TOKEN = "token-of-ada"
OTHER = "token-of-grace"


def disc(y: int = 60, x: int = 70, radius: int = 25, seed: int = 0) -> tuple[Any, Any]:
    """A picture of 120x140 with a bright disc, and its mask."""
    noise = np.random.default_rng(seed).integers(0, 12, (120, 140))
    yy, xx = np.mgrid[:120, :140]
    mask = (yy - y) ** 2 + (xx - x) ** 2 < radius**2
    return (40 + noise + 120 * mask).astype(np.uint8), mask


def ball(slices: int = 7) -> tuple[Any, Any]:
    """A volume of slices with a ball, and its mask."""
    middle = slices // 2
    radii = [int(25 - 2.5 * (index - middle) ** 2) for index in range(slices)]
    pairs = [disc(radius=max(radius, 0), seed=i) for i, radius in enumerate(radii)]
    return np.stack([one for one, _ in pairs]), np.stack([mask for _, mask in pairs])


def fill(library: Library, count: int = 4) -> None:
    """Add discs."""
    for seed in range(count):
        image, mask = disc(50 + 5 * seed, 60 + 6 * seed, 20 + seed, seed)
        library.add(image, {"disc": mask}, key=f"disc {seed}")


def http(method: str, url: str, **more: Any) -> httpx.Response:
    """Ask once; httpx itself gives up after 5 s, which a busy machine may take."""
    return httpx.request(method, url, timeout=300, **more)


@dataclass
class Served:
    """A server that runs, and what is behind it."""

    server: AnnotationServer
    desk: Desk
    audit: Path
    application: Any

    @property
    def url(self) -> str:
        return self.server.url


@contextmanager
def serving(
    folder: Path,
    *,
    exemplars: int = 4,
    limits: Limits | None = None,
    images: Path | None = None,
    bundle: str = "demo",
    engine: str | None = None,
    threads: int | None = 1,
    **options: Any,
) -> Iterator[Served]:
    """Serve a new library below ``folder``."""
    limits = limits or Limits()
    folder.mkdir(parents=True, exist_ok=True)
    with Library.create(folder / "library", bundle, engine=engine, threads=threads) as library:
        fill(library, exemplars)
        audit = folder / "audit.jsonl"
        desk = Desk(library, AuditLog(audit))
        worklist = None if images is None else Worklist(images, library)
        application = make_application(
            desk,
            {TOKEN: "ada", OTHER: "grace"},
            limits=limits,
            worklist=worklist,
            **options,
        )
        with AnnotationServer(application, port=0, limits=limits) as server:
            yield Served(server, desk, audit, application)
