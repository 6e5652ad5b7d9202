"""What one server gives to all of its clients together, and to each."""

from __future__ import annotations

from dataclasses import dataclass, fields
from threading import Lock

from recallseg.engines.errors import InputError

__all__ = ["Budget", "Limits", "RefusedError"]


class RefusedError(InputError):
    """A request that is not answered, and the HTTP status that says why.

    Attributes
    ----------
    status : 4xx or 503.
    retry_s : seconds after which asking again may help; None if it will not.
    """

    def __init__(self, status: int, message: str, retry_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_s = status, retry_s


@dataclass(frozen=True)
class Limits:
    """Of a server.

    Attributes
    ----------
    sessions : opened at once, by all clients.
    body_bytes : of one request that brings pixels; others may bring 1 MiB.
    image_bytes : of one array after decompression.
    total_bytes : of all that clients have opened or are sending.
    connections : at once.
    idle_s : until a session is closed in which nobody did anything.
    liveness_s : until one is closed whose client was not heard of at all.
    body_s : for one request to arrive.
    """

    sessions: int = 32
    body_bytes: int = 1 << 29
    image_bytes: int = 1 << 30
    total_bytes: int = 1 << 32
    connections: int = 256
    idle_s: float = 600.0
    liveness_s: float = 60.0
    body_s: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise InputError(
                    f"the limit {field.name} must be above 0, got {getattr(self, field.name)}."
                )


class Budget:
    """Bytes that are taken and given back, never more than ``most`` at once."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0
        self._lock = Lock()

    def take(self, count: int) -> None:
        """Take bytes; raises RefusedError (503) if there are too few left."""
        with self._lock:
            if self.taken + count > self.most:
                raise RefusedError(
                    503,
                    f"this takes {count} bytes; clients hold {self.taken} of the {self.most} that "
                    "this server gives. Close what is not needed, or try again later.",
                    retry_s=10,
                )
            self.taken += count

    def give(self, count: int) -> None:
        """Give bytes back."""
        with self._lock:
            self.taken -= count
