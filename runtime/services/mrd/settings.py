"""The section ``mrd`` of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

from pydantic import Field

from recallseg.runtime.services.sections import Listening, Place, Port, Seconds, Section

if TYPE_CHECKING:
    from recallseg.runtime.services.settings import Configuration

__all__ = ["MrdSettings", "Returned"]


class Returned(Section):
    """What is answered, unless the message's parameters of the same names say otherwise.

    Attributes
    ----------
    original : images as they came, at once.
    mask : label values as a series of their own.
    overlay : the image in colour with the structures over it, as a series.
    roi : the image with contours for the viewer, as a series; two-dimensional images only.
    """

    original: bool = True
    mask: bool = True
    overlay: bool = False
    roi: bool = False


class MrdSettings(Listening):
    """Where MRD is spoken, and within which bounds.

    Attributes
    ----------
    idle_s : between two messages: a scan may be long.
    message_s : without a byte within one message.
    deadline_s : for an image, from its arrival or from the answer to the one before it.
    finish_s : for all that is left when the sender has no more; then comes CLOSE.
    most_bytes : held of each connection; one that needs more waits, and no message may be larger.
    returned : see :class:`Returned`.
    colours : name of a scanner's colour table for masks; empty for none.
    record : folder for what arrives, without identifiers, for reports of faults.
    """

    port: Port = 9002
    most_clients: Annotated[int, Field(ge=1, le=1000)] = 8
    idle_s: Seconds = 3600.0
    message_s: Seconds = 60.0
    deadline_s: Seconds = 10.0
    finish_s: Seconds = 120.0
    most_bytes: Annotated[int, Field(ge=2**20)] = 512 * 2**20
    returned: Returned = Returned()
    colours: str = ""
    record: Optional[Place] = None

    def problems(self, configuration: Configuration) -> list[str]:
        """Return what is wrong with what it names, a sentence each."""
        told = []
        if not configuration.rules:
            told.append("mrd: there are no rules, so every image is passed on alone")
        if self.record is not None and not self.record.parent.is_dir():
            told.append(f"mrd.record: there is no folder {self.record.parent}")
        return told
