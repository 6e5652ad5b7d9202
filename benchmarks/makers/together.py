"""``bench soak --minutes``: all services in one process, among writers and readers of a library.

Peers are those that hospitals and annotators have: pynetdicom, nnInteractive's client, ismrmrd's
serializers, pyigtl.
"""

from __future__ import annotations

import io
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.facts import bundle_facts, head
from recallseg.benchmarks.machine import Watch, describe_conditions
from recallseg.benchmarks.makers.load import Load, Times, duration_series, process_series, reading
from recallseg.benchmarks.schema import Report, TogetherRun
from recallseg.benchmarks.subjects import RuntimeChoice
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.runtime.library import Library
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.http.application import make_application
from recallseg.runtime.services.http.desk import Desk
from recallseg.runtime.services.http.server import AnnotationServer
from recallseg.runtime.services.igtl.service import Igtl
from recallseg.runtime.services.memory import FreeMemory
from recallseg.runtime.services.mrd.service import Mrd
from recallseg.runtime.services.node.node import Node
from recallseg.runtime.services.settings import Configuration
from recallseg.runtime.services.stream import Stream

__all__ = ["run_together"]

SIDE = 128
READINGS = 400
LEAST_S = 1.0
"""Between two readings."""
PATIENCE_S = 300.0
"""For one answer of a service, on a machine that others use too."""
TOKEN = "soak"  # noqa: S105  # of a server that only this process reaches
MR = "1.2.840.10008.5.1.4.1.1.4"
EXPLICIT = "1.2.840.10008.1.2.1"


def run_together(
    bundle: Bundle,
    choice: RuntimeChoice,
    *,
    minutes: float,
    folder: Path,
    step: Callable[[str], None] = lambda what: None,
) -> Report:
    """Let everything work for a while.

    Parameters
    ----------
    bundle, choice : model, and the engine, precision and threads that each service runs it with.
    minutes : how long.
    folder : for libraries and states; it is left as it is then.
    step : told what the process holds and has done.

    Raises
    ------
    InputError
        If there is too little time to see anything.
    """
    if minutes * 60 < 8 * LEAST_S:
        raise InputError(f"a soak test needs more than {8 * LEAST_S:g} seconds.")
    conditions, watch = describe_conditions(), Watch()
    asking = {"engine": choice.engine, "precision": choice.precision, "threads": choice.threads}
    readings: list[tuple[float, dict[str, float]]] = []
    load = Load()
    library = _filled(folder / "library", bundle, asking)
    rule = {"name": "disc", "library": library, "recipe": {"k": 2, **asking}}
    with ExitStack() as stack:
        for service in (_served, _node, _streamed, _grown, _mrd, _igtl):
            stack.enter_context(service(folder, bundle, rule, asking, load))
            stack.callback(load.end)  # before it ends itself
        every, begun = max(LEAST_S, minutes * 60 / READINGS), load.seconds
        free = FreeMemory()  # as in the loop of a service
        while not readings or load.seconds - begun < minutes * 60:
            readings.append((load.seconds, reading(folder)))
            step(f"{load.seconds:.0f} s, {_shown(readings[-1][1])}, {dict(load.counts)}")
            load.over.wait(every)
            free.give_back()
        load.end()
    conditions |= watch.stop()
    run = TogetherRun(
        minutes=round((readings[-1][0] - readings[0][0]) / 60, 2),
        counts=dict(load.counts),
        errors=tuple(load.errors),
        process=process_series(readings),
        latency=duration_series(load.spent),
    )
    return Report(
        kind="soak",
        **head(conditions),
        settings={"minutes": minutes, "side": SIDE, **asking},
        bundle=bundle_facts(bundle),
        together=(run,),
    )


def _shown(taken: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in taken.items())


def disc(number: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Return an image with a bright disc whose place and size are of the number, and its mask."""
    chance = np.random.default_rng(number)
    y, x, radius = chance.integers(48, 80), chance.integers(48, 80), chance.integers(16, 28)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    mask = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    noise = chance.integers(0, 12, (SIDE, SIDE))
    return (40 + noise + 120 * mask).astype(np.uint16), mask


def _filled(folder: Path, bundle: Bundle, asking: dict[str, Any]) -> Path:
    with Library.create(folder, bundle, **asking) as library:
        for number in range(8):
            image, mask = disc(number)
            library.add(image, {"disc": mask}, key=f"disc {number}")
    return folder


def _configured(
    service: str, section: dict[str, Any], rule: dict[str, Any], **more: Any
) -> Configuration:
    return Configuration.model_validate({service: section, "rules": [rule], **more})


@contextmanager
def _grown(
    folder: Path, bundle: Bundle, rule: dict[str, Any], asking: dict[str, Any], load: Load
) -> Iterator[None]:
    """A library to which exemplars are added, and removed; others ask meanwhile; eight stay."""
    with Library.open(_filled(folder / "growing", bundle, asking), mode="write", **asking) as lib:

        def change(number: int) -> None:
            image, mask = disc(1000 + number)
            lib.add(image, {"disc": mask}, key=f"goes {number}", tags={"n": str(number)})
            if number >= 5:
                lib.remove(f"goes {number - 5}")
            if number % 50 == 49:
                lib.compact()

        with Segmenter(lib, k=4, **asking) as segmenter:
            load.begin("exemplars added and removed", change, 0.5)
            load.begin("queries", lambda n: _expect_disc(segmenter.segment(disc(n)[0])), 0.2)
            yield


def _expect_disc(result: Any) -> None:
    if not result.masks["disc"].any():
        raise AssertionError("nothing was found")


@contextmanager
def _streamed(
    folder: Path, bundle: Bundle, rule: dict[str, Any], asking: dict[str, Any], load: Load
) -> Iterator[None]:
    """Frames, ten a second, with the memories of those before."""
    frames = [disc(number)[0] for number in range(8)]

    def shown(frame: Any) -> None:
        if frame.error is not None:
            load.errors.append(f"frames: {frame.error!r}")
        load.counts["frames segmented"] += 1
        spent.add(load.seconds, frame.latency_ms)

    spent = load.spent["frames segmented"] = Times()
    with (
        Segmenter(rule["library"], k=2, frames=3, **asking) as segmenter,
        Stream(segmenter, shown) as stream,
    ):
        load.begin("frames pushed", lambda number: stream.push(frames[number % 8]), 0.1)
        yield


@contextmanager
def _served(
    folder: Path, bundle: Bundle, rule: dict[str, Any], asking: dict[str, Any], load: Load
) -> Iterator[None]:
    """An annotation server, and clients of nnInteractive that open an image, click and go."""
    from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession

    with Library.open(
        _filled(folder / "served", bundle, asking), mode="write", **asking
    ) as library:
        desk = Desk(library, AuditLog(folder / "audit.jsonl"))
        application = make_application(desk, {TOKEN: "soak"})
        with AnnotationServer(application, port=0) as server:

            def annotate(number: int) -> None:
                image, mask = disc(2000 + number)
                target = np.zeros((1, *image.shape), np.uint8)
                inside = [int(each[len(each) // 2]) for each in np.nonzero(mask)]
                with nnInteractiveRemoteInferenceSession(server.url, api_key=TOKEN) as session:
                    session.set_image(image[None, None])
                    session.set_target_buffer(target)
                    session.add_point_interaction([0, *inside], True)
                    session.add_point_interaction([0, 2, 2], False)
                if not target.any():
                    raise AssertionError("a click drew nothing")

            for client in range(2):
                load.begin(f"images annotated by client {client + 1}", annotate, 1.0)
            yield


@contextmanager
def _node(
    folder: Path, bundle: Bundle, rule: dict[str, Any], asking: dict[str, Any], load: Load
) -> Iterator[None]:
    """A DICOM node, and a sender of series that are answered and then forgotten."""
    from pynetdicom import AE

    section = {"port": 0, "quiet_s": 0.2, "reserve_bytes": 0, "keep_hours": 1e-6}
    node = Node(_configured("node", section, rule, state=folder / "node"))
    try:
        node.start()

        def send(number: int) -> None:
            before = node.counts()["jobs"].get("made", 0)
            ae = AE("SCANNER")
            ae.add_requested_context(MR, EXPLICIT)
            association = ae.associate("127.0.0.1", node.port, ae_title="RECALLSEG")
            if not association.is_established:
                raise AssertionError("the node takes no association")
            for dataset in _series_of(number):
                status = association.send_c_store(dataset).get("Status")
                if status != 0:
                    ended = "aborted" if association.is_aborted else "not aborted"
                    raise AssertionError(
                        f"an object was not taken: status {status}, association {ended}, "
                        f"{node.troubles()}"
                    )
            association.release()
            until = time.monotonic() + PATIENCE_S
            while node.counts()["jobs"].get("made", 0) == before:
                if time.monotonic() > until:
                    raise AssertionError(f"not answered: {node.counts()}, {node.troubles()}")
                time.sleep(0.05)
            node.sweep()

        load.begin("series answered by the node", send, 1.0)
        yield
    finally:
        node.stop(5)


def _series_of(number: int) -> Iterator[Any]:
    """Yield the slices of an MR series, as a scanner would send them."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, generate_uid

    study, series, reference = generate_uid(), generate_uid(), generate_uid()
    for place in range(3):
        pixels, _ = disc(3000 + number)
        made = Dataset()
        made.file_meta = FileMetaDataset()
        made.file_meta.TransferSyntaxUID = UID(EXPLICIT)
        made.SOPClassUID, made.SOPInstanceUID = MR, generate_uid()
        made.StudyInstanceUID, made.SeriesInstanceUID = study, series
        made.FrameOfReferenceUID, made.Modality = reference, "MR"
        made.PatientName, made.PatientID, made.PatientBirthDate = "Soak^Test", "0", ""
        made.PatientSex = made.StudyDate = made.StudyTime = made.StudyID = ""
        made.AccessionNumber = made.ReferringPhysicianName = ""
        made.SeriesNumber, made.InstanceNumber = number + 1, place + 1
        made.ImageType, made.Manufacturer = ["ORIGINAL", "PRIMARY"], "none"
        made.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        made.ImagePositionPatient = [0, 0, 3 * place]
        made.PixelSpacing, made.SliceThickness = [1, 1], 3
        made.Rows, made.Columns = pixels.shape
        made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
        made.BitsAllocated, made.BitsStored, made.HighBit = 16, 16, 15
        made.PixelRepresentation, made.PixelData = 0, pixels.astype("<u2").tobytes()
        yield made


@contextmanager
def _mrd(
    folder: Path, bundle: Bundle, rule: dict[str, Any], asking: dict[str, Any], load: Load
) -> Iterator[None]:
    """An MRD service, and a scanner that sends images and reads what comes back."""
    from ismrmrd import Image
    from ismrmrd.serialization import ConfigFile, ProtocolDeserializer, ProtocolSerializer

    service = Mrd(_configured("mrd", {"port": 0, "deadline_s": PATIENCE_S}, rule))
    try:
        service.start()

        def scan(number: int) -> None:
            image = Image.from_array(disc(4000 + number)[0], transpose=False)
            head = image.getHead()
            head.read_dir, head.phase_dir, head.slice_dir = (1, 0, 0), (0, 1, 0), (0, 0, 1)
            head.field_of_view = (float(SIDE), float(SIDE), 3.0)
            head.image_type, head.image_series_index, head.image_index = 1, 1, 1
            image.setHead(head)
            with socket.create_connection(("127.0.0.1", service.port), 20) as link:
                link.settimeout(PATIENCE_S)
                with io.BytesIO() as kept:
                    writer = ProtocolSerializer(kept)
                    writer.serialize(ConfigFile("default"))
                    kept.write(struct.pack("<HI", 3, len(_HEADER)) + _HEADER)
                    writer.serialize(image)
                    writer.close()
                    whole = kept.getvalue()
                sender = threading.Thread(target=link.sendall, args=(whole,))
                sender.start()
                with link.makefile("rb") as stream:
                    came = [*ProtocolDeserializer(stream).deserialize()]
                sender.join()
            images = [each for each in came if isinstance(each, Image)]
            if len(images) != 2:
                raise AssertionError(f"{len(images)} images came back, of an image and its mask")

        load.begin("images answered by MRD", scan, 0.5)
        yield
    finally:
        service.stop(5)


_HEADER = b"""<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
<measurementInformation><patientPosition>HFS</patientPosition></measurementInformation>
<experimentalConditions><H1resonanceFrequency_Hz>63500000</H1resonanceFrequency_Hz>
</experimentalConditions></ismrmrdHeader>"""


@contextmanager
def _igtl(
    folder: Path, bundle: Bundle, rule: dict[str, Any], asking: dict[str, Any], load: Load
) -> Iterator[None]:
    """An OpenIGTLink service, and a scanner that sends frames and shows their masks."""
    import pyigtl

    service = Igtl(_configured("igtl", {"port": 0, "deadline_ms": PATIENCE_S * 1e3}, rule))
    client = None
    try:
        service.start()
        client = pyigtl.OpenIGTLinkClient("127.0.0.1", service.port)

        def show(number: int) -> None:
            client.send_message(pyigtl.ImageMessage(disc(number)[0][None], device_name="Frame"))
            if client.wait_for_message("Frame-mask", timeout=PATIENCE_S) is None:
                raise AssertionError("no mask came")

        load.begin("frames answered by OpenIGTLink", show, 0.2)
        yield
    finally:
        if client is not None:
            client.stop()
        service.stop(5)
