"""An MRD service with the fake engine, and a client made of ``ismrmrd``'s own serializers."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np
from ismrmrd.serialization import ConfigFile, ProtocolDeserializer, ProtocolSerializer

from recallseg.runtime.services.mrd.service import Mrd
from recallseg.runtime.services.settings import Configuration

HEADER = """<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
<subjectInformation><patientName>DOE^JANE</patientName><patientID>4711</patientID>
</subjectInformation>
<measurementInformation><patientPosition>HFS</patientPosition>
<protocolName>t2_spine</protocolName></measurementInformation>
<acquisitionSystemInformation><stationName>MR01</stationName></acquisitionSystemInformation>
<experimentalConditions><H1resonanceFrequency_Hz>63500000</H1resonanceFrequency_Hz>
</experimentalConditions>
<encoding><trajectory>cartesian</trajectory>
<encodedSpace><matrixSize><x>64</x><y>64</y><z>1</z></matrixSize>
<fieldOfView_mm><x>64</x><y>64</y><z>3</z></fieldOfView_mm></encodedSpace>
<reconSpace><matrixSize><x>64</x><y>64</y><z>1</z></matrixSize>
<fieldOfView_mm><x>64</x><y>64</y><z>3</z></fieldOfView_mm></reconSpace>
<encodingLimits></encodingLimits></encoding></ismrmrdHeader>"""


def configured(library: Path, **changes: Any) -> Configuration:
    """A configuration for tests; ``changes`` are of the section ``mrd``, but rules and audit."""
    rule = {"name": "half", "library": library, "recipe": {"k": 1, "engine": "fake"}}
    top = {name: changes.pop(name) for name in ("audit", "rules", "metrics") if name in changes}
    mrd = {"port": 0, "message_s": 60, "deadline_s": 120, "finish_s": 120, **changes}
    return Configuration(**{"rules": [rule], "mrd": mrd, **top})


@contextmanager
def running(configuration: Configuration) -> Iterator[Mrd]:
    """Start a service, and stop it."""
    service = Mrd(configuration)
    try:
        service.start()
        yield service
    finally:
        service.stop(5)


def image_of(pixels: np.ndarray, series: int = 1, index: int = 1, **fields: Any) -> Any:
    """An axial image, Y x X, Z x Y x X or channels x Z x Y x X, with a place of its own."""
    image = ismrmrd.Image.from_array(pixels, transpose=False)
    head = image.getHead()
    head.position = (11.5, -22.25, 33.125)
    head.read_dir, head.phase_dir, head.slice_dir = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    head.field_of_view = (64.0, 64.0, 3.0 * image.data.shape[1])
    head.image_series_index, head.image_index = series, index
    head.image_type = 1
    for name, value in fields.items():
        setattr(head, name, value)
    image.setHead(head)
    return image


def asked(
    port: int,
    images: list[Any],
    *,
    config: str = "default",
    parameters: str | None = None,
    header: str = HEADER,
) -> list[Any]:
    """Send images by ``ismrmrd``'s serializer, and return all that its deserializer reads."""
    with socket.create_connection(("127.0.0.1", port), 300) as link:
        stream: Any = link.makefile("rwb")

        def send() -> None:
            writer = ProtocolSerializer(stream)
            writer.serialize(ConfigFile(config))
            stream.write(struct.pack("<HI", 3, len(header)) + header.encode())
            if parameters is not None:
                writer.serialize(parameters)
            for image in images:
                writer.serialize(image)
            writer.close()

        sender = threading.Thread(target=send)
        sender.start()
        found = list(ProtocolDeserializer(link.makefile("rb")).deserialize())
        sender.join()
        return found
