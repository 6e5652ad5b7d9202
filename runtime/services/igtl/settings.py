"""The section ``igtl`` of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

from pydantic import Field

from recallseg.runtime.services.sections import Host, Listening, Port, Seconds, Section

if TYPE_CHECKING:
    from recallseg.runtime.services.settings import Configuration

__all__ = ["IgtlSettings", "Source"]


class Source(Section):
    """A server that frames come from, e.g. PLUS; the service is its client.

    Attributes
    ----------
    answered : whether it is sent the label maps too.
    retry_s : until it is tried again, when it is not there.
    """

    host: Host = "127.0.0.1"
    port: Port = 18944
    answered: bool = False
    retry_s: Seconds = 1.0


class IgtlSettings(Listening):
    """Where OpenIGTLink is spoken, and within which bounds.

    Attributes
    ----------
    idle_s : between two messages; a viewer may only listen.
    message_s : without a byte within one message, or without one taken.
    deadline_ms : from a frame's arrival to its label map.
    most_bytes : of a message.
    suffix : of a device's name, for its label maps.
    images : whether frames are passed on too.
    source : see :class:`Source`; None for none.
    """

    port: Port = 18944
    most_clients: Annotated[int, Field(ge=1, le=1000)] = 16
    idle_s: Seconds = 86400.0
    message_s: Seconds = 10.0
    deadline_ms: Annotated[float, Field(gt=0, le=3.6e6)] = 500.0
    most_bytes: Annotated[int, Field(ge=2**16)] = 256 * 2**20
    suffix: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,10}$")] = "-mask"
    images: bool = True
    source: Optional[Source] = None

    def problems(self, configuration: Configuration) -> list[str]:
        """Return what is wrong with what it names, a sentence each."""
        return [] if configuration.rules else ["igtl: there are no rules, so no frame is segmented"]
