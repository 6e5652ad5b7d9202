"""MRD with the counterparts' own code: ismrmrd's serializers and Gadgetron's connection."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np
import pytest
from support.mrd import HEADER, asked, configured, image_of, running
from support.services import half_library, half_volume, wait_until, what_comes_to_the_end

from recallseg import Bundle
from recallseg.runtime.services.audit import verify_audit_log
from recallseg.runtime.services.mrd.recording import replay
from recallseg.runtime.services.mrd.service import Mrd
from recallseg.runtime.services.mrd.wire import TEXT, Image, Link

PLACE = ("position", "read_dir", "phase_dir", "slice_dir", "field_of_view")


@pytest.fixture(scope="module")
def library(fake_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_library(tmp_path_factory.mktemp("mrd") / "lib", fake_bundle)


@pytest.fixture(scope="module")
def service(library: Path) -> Iterator[Mrd]:
    with running(configured(library, most_clients=4)) as service:
        yield service


def images_in(found: list[Any]) -> list[Any]:
    return [each for each in found if isinstance(each, ismrmrd.Image)]


def texts_in(found: list[Any]) -> list[str]:
    return [each for each in found if isinstance(each, str)]


def same_place(one: Any, other: Any) -> bool:
    heads = one.getHead(), other.getHead()
    return all(list(getattr(heads[0], n)) == list(getattr(heads[1], n)) for n in PLACE)


def test_the_original_comes_back_untouched_and_a_mask_at_its_place(service: Mrd) -> None:
    pixels = half_volume(1)[0]
    sent = image_of(pixels, series=7, index=3, slice=5, repetition=2)
    sent.attribute_string = ismrmrd.Meta({"EchoTime": "2.5", "IceMiniHead": "abc"}).serialize()
    original, mask = images_in(asked(service.port, [sent]))
    assert original.to_bytes() == sent.to_bytes()
    assert same_place(mask, sent)
    assert mask.getHead().image_series_index != 7
    assert (mask.getHead().image_index, mask.getHead().slice, mask.repetition) == (3, 5, 2)
    assert mask.data.dtype == np.uint16
    assert mask.data.shape == (1, 1, 64, 64)
    assert ((mask.data[0, 0] == 1) == (pixels > 100)).mean() > 0.95
    meta = ismrmrd.Meta.deserialize(mask.attribute_string)
    assert meta["EchoTime"] == "2.5"
    assert meta["IceMiniHead"] == "abc"
    assert meta["Keep_image_geometry"] == "1"
    assert meta["SeriesDescriptionAdditional"] == ["half", "mask"]
    assert "RECALLSEG" in meta["ImageProcessingHistory"]
    assert "1 half" in meta["ImageComment"]


@pytest.mark.parametrize(
    "dtype", ["uint16", "int16", "uint32", "float32", "float64", "complex64", "complex128"]
)
def test_all_types_of_pixels_give_the_same_mask(service: Mrd, dtype: str) -> None:
    pixels = half_volume(1)[0].astype(dtype)
    if dtype.startswith("complex"):
        pixels = (pixels * np.exp(1j * np.linspace(0, 6, 64))).astype(dtype)
    original, mask = images_in(asked(service.port, [image_of(pixels)]))
    assert (original.data[0, 0] == pixels).all()
    assert mask.data[0, 0, :30].all()
    assert not mask.data[0, 0, 34:].any()


def test_a_turned_image_is_segmented_upright_and_its_mask_lies_as_it_came(service: Mrd) -> None:
    """Rows run to the front: on screen the image stands on its head, as stored it does not."""
    pixels = np.flipud(half_volume(1)[0]).copy()
    sent = image_of(pixels, phase_dir=(0, -1, 0), slice_dir=(0, 0, -1))
    _, mask = images_in(asked(service.port, [sent]))
    assert mask.data[0, 0, 34:].all()
    assert not mask.data[0, 0, :30].any()
    # Turned after it was acquired: the attributes say how it lies, the header how it was read.
    turned = image_of(half_volume(1)[0], read_dir=(0, 1, 0), phase_dir=(1, 0, 0))
    turned.attribute_string = ismrmrd.Meta(
        {"ImageRowDir": ["1", "0", "0"], "ImageColumnDir": ["0", "1", "0"]}
    ).serialize()
    _, mask = images_in(asked(service.port, [turned]))
    assert mask.data[0, 0, :30].all()
    assert not mask.data[0, 0, 34:].any()


def test_volumes_stacks_and_several_series_at_once(service: Mrd) -> None:
    volume = image_of(half_volume(4)[None], series=1)
    stack = [image_of(half_volume(1, seed=n)[0], series=2, index=n, slice=n) for n in range(5)]
    sent = [stack[0], volume, *stack[1:]]
    found = images_in(asked(service.port, sent))
    originals = [each for each in found if each.getHead().image_series_index < 1000]
    assert [each.to_bytes() for each in originals] == [each.to_bytes() for each in sent]
    masks = [each for each in found if each.getHead().image_series_index >= 1000]
    assert len(masks) == 6
    assert len({each.getHead().image_series_index for each in masks}) == 2
    (whole,) = (each for each in masks if each.data.shape[1] == 4)
    assert whole.data[0, :, :30].all()
    assert not whole.data[0, :, 34:].any()
    assert same_place(whole, volume)
    assert [m.getHead().slice for m in masks if m.data.shape[1] == 1] == [0, 1, 2, 3, 4]


def test_results_leave_out_the_series_that_the_scanner_has_used(service: Mrd) -> None:
    pixels = half_volume(1)[0]
    found = images_in(asked(service.port, [image_of(pixels, 1000), image_of(pixels, 1)]))
    assert sorted(each.getHead().image_series_index for each in found) == [1, 1000, 1001, 1002]


def test_a_series_that_the_scanner_uses_after_a_result_is_told(service: Mrd) -> None:
    """The second image comes only when the first one was answered."""
    told: list[str] = []
    series: list[int] = []
    with socket.create_connection(("127.0.0.1", service.port), 300) as link:
        reader = Link(link, idle_s=20, message_s=20, most_bytes=2**28)
        for number in (1, 1000, 1):
            sent = image_of(half_volume(1)[0], number)
            link.sendall(struct.pack("<H", 1022) + sent.to_bytes())
            count = len(series) + 2
            while len(series) < count:
                message = reader.read()
                if message.id == TEXT:
                    told.append(message.text)
                else:
                    series.append(int(Image.of(message.raw).header["image_series_index"]))
    assert series == [1, 1000, 1000, 1001, 1, 1002]
    assert len([text for text in told if "series 1000" in text]) == 1


def test_parameters_choose_what_is_returned(service: Mrd) -> None:
    pixels = half_volume(1)[0]
    told = {"original": False, "mask": "true", "overlay": True, "roi": True, "k": 1}
    told |= {"structures": "half", "config": "half"}
    found = images_in(
        asked(service.port, [image_of(pixels)], parameters=json.dumps({"parameters": told}))
    )
    mask, overlay, roi = found
    assert len({each.getHead().image_series_index for each in found}) == 3
    assert mask.data.max() == 1
    assert overlay.getHead().image_type == 6
    assert overlay.data.shape == (3, 1, 64, 64)
    assert overlay.data.max() <= 255
    red, blue = overlay.data[0, 0].astype(int), overlay.data[2, 0].astype(int)
    assert ((red != blue) == (mask.data[0, 0] > 0)).all()
    assert (roi.data == pixels).all()
    meta = ismrmrd.Meta.deserialize(roi.attribute_string)
    values = [float(value) for value in meta["ROI_1_1"]]
    assert values[3:6] == [1, 0, 1]
    points = np.array(values[6:]).reshape(-1, 2)
    assert (points[0] == points[-1]).all()
    rows, columns = np.nonzero(mask.data[0, 0])
    assert np.allclose(points.min(0), [rows.min(), columns.min()], atol=0.5)
    assert np.allclose(points.max(0), [rows.max() + 1, columns.max() + 1], atol=0.5)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"k": "many"}, "k is a number"),
        ({"mask": "perhaps"}, "mask is true or false"),
        ({"structures": "spleen"}, "spleen"),
        ({"k": 999}, "k"),
    ],
)
def test_wrong_parameters_are_told_and_the_image_passes(
    service: Mrd, told: dict[str, Any], said: str
) -> None:
    sent = image_of(half_volume(1)[0])
    found = asked(service.port, [sent], parameters=json.dumps({"parameters": told}))
    assert [each.to_bytes() for each in images_in(found)] == [sent.to_bytes()]
    assert said in " ".join(texts_in(found))


def test_other_messages_pass_and_phase_is_not_segmented(service: Mrd) -> None:
    acquisition = ismrmrd.Acquisition.from_array(np.ones((2, 8), np.complex64))
    waveform = ismrmrd.Waveform.from_array(np.arange(12, dtype=np.uint32).reshape(3, 4))
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    phase = image_of(half_volume(1)[0], image_type=2)
    found = asked(service.port, [acquisition, waveform, array, phase])
    assert (found[0].data == acquisition.data).all()
    assert (found[1].data == waveform.data).all()
    assert (found[2] == array).all()
    assert found[3].to_bytes() == phase.to_bytes()
    assert len(images_in(found)) == 1
    assert "phase" in " ".join(texts_in(found))


def test_texts_end_with_nul_where_the_scanners_do(service: Mrd) -> None:
    """As FIRE sends them; the lengths count it."""
    sent = image_of(half_volume(1)[0])
    text = sent.attribute_string.encode() + b"\0"
    head = sent.getHead()
    head.attribute_string_len = len(text)
    raw = struct.pack("<H", 1022) + bytes(head) + struct.pack("<Q", len(text)) + text
    raw += sent.data.tobytes()
    header = HEADER.encode() + b"\0"
    parameters = b'{"parameters": {"original": "false"}}\0'
    stream = struct.pack("<H", 1) + b"openrecon".ljust(1024, b"\0")
    stream += struct.pack("<HI", 3, len(header)) + header
    stream += struct.pack("<HI", 5, len(parameters)) + parameters + raw + struct.pack("<H", 4)
    with socket.create_connection(("127.0.0.1", service.port), 300) as link:
        link.sendall(stream)
        came = b"".join(iter(lambda: link.recv(65536), b""))
    (length,) = struct.unpack_from("<Q", came, 200)
    assert came[207 + length : 208 + length] == b"\0"
    assert came[208 : 207 + length].rstrip().endswith(b"</ismrmrdMeta>")
    assert len(came) == 208 + length + 64 * 64 * 2 + 2
    assert came[-2:] == struct.pack("<H", 4)


def test_gadgetrons_own_connection_reads_the_answer(service: Mrd) -> None:
    """Its end of a connection is handed what the service says, after configuration and header."""
    external = pytest.importorskip("gadgetron.external.connection")
    sent = image_of(half_volume(1)[0])
    ours, theirs = socket.socketpair()
    link = socket.create_connection(("127.0.0.1", service.port), 300)

    def bridge() -> None:
        config = b"<configuration/>"
        ours.sendall(struct.pack("<HI", 2, len(config)) + config)
        ours.sendall(struct.pack("<HI", 3, len(HEADER)) + HEADER.encode())
        link.sendall(struct.pack("<HI", 2, len(config)) + config)
        link.sendall(struct.pack("<HI", 3, len(HEADER)) + HEADER.encode())
        link.sendall(struct.pack("<H", 1022) + sent.to_bytes() + struct.pack("<H", 4))
        while part := link.recv(65536):
            ours.sendall(part)

    thread = threading.Thread(target=bridge)
    thread.start()
    with ours, link, theirs:
        found = list(external.Connection(theirs))
        thread.join()
    assert len(found) == 2
    assert found[0].to_bytes() == sent.to_bytes()
    assert found[1].data[0, 0, :30].all()


def test_what_comes_too_late_is_passed_on_alone_and_the_stream_ends(library: Path) -> None:
    with running(configured(library, deadline_s=0.3, finish_s=1.0)) as service:
        process = service.segmenting.process
        assert process is not None
        os.kill(process, signal.SIGSTOP)  # until it goes on, nothing is answered
        sent = [image_of(half_volume(1)[0], index=n) for n in range(8)]
        told = json.dumps({"parameters": {"original": False}})
        found = asked(service.port, sent, parameters=told)
        os.kill(process, signal.SIGCONT)
    assert [each.to_bytes() for each in images_in(found)] == [each.to_bytes() for each in sent]
    assert "too long" in " ".join(texts_in(found))


def test_a_segmentation_that_dies_is_started_anew(service: Mrd) -> None:
    process = service.segmenting.process
    assert process is not None
    os.kill(process, signal.SIGKILL)
    sent = image_of(half_volume(1)[0])
    assert images_in(asked(service.port, [sent]))[0].to_bytes() == sent.to_bytes()
    wait_until(lambda: service.segmenting.ready and service.segmenting.process != process)
    assert len(images_in(asked(service.port, [sent]))) == 2


def test_too_many_connections_are_refused_with_close(service: Mrd) -> None:
    wait_until(lambda: len(service._acceptor) == 0)  # those of the tests before
    links = [socket.create_connection(("127.0.0.1", service.port), 300) for _ in range(4)]
    wait_until(lambda: len(service._acceptor) == 4)
    with socket.create_connection(("127.0.0.1", service.port), 300) as one_more:
        assert one_more.recv(10) == struct.pack("<H", 4)
    for link in links:
        link.close()
    wait_until(lambda: len(service._acceptor) == 0)


def test_random_and_truncated_streams_end_and_others_are_served(service: Mrd) -> None:
    """Each ends with CLOSE, if the sender still reads; none lasts."""
    chance = random.Random(5)
    sent = image_of(half_volume(1)[0])
    whole = struct.pack("<H", 1) + bytes(1024) + struct.pack("<HI", 3, len(HEADER))
    whole += HEADER.encode() + struct.pack("<H", 1022) + sent.to_bytes() + struct.pack("<H", 4)
    for number in range(40):
        if number % 2:
            stream = whole[: chance.randrange(len(whole))]
        else:
            damaged = bytearray(whole)
            for _ in range(chance.randrange(1, 12)):
                damaged[chance.randrange(2600)] = chance.randrange(256)
            stream = bytes(damaged) if number % 4 else chance.randbytes(chance.randrange(3000))
        with socket.create_connection(("127.0.0.1", service.port), 300) as link:
            link.sendall(stream)
            came = what_comes_to_the_end(link)
        assert came.endswith(struct.pack("<H", 4))
    assert len(images_in(asked(service.port, [sent]))) == 2
    assert service.alive()


def test_recordings_name_nobody_and_can_be_sent_again(library: Path, tmp_path: Path) -> None:
    sent = image_of(half_volume(1)[0], acquisition_time_stamp=987654)
    sent.attribute_string = ismrmrd.Meta(
        {"PatientName": "DOE^JANE", "EchoTime": "2.5", "IceMiniHead": "DOE"}
    ).serialize()
    told = json.dumps({"parameters": {"mask": True, "operator": "JANE"}})
    waveform = ismrmrd.Waveform.from_array(np.arange(12, dtype=np.uint32).reshape(3, 4))
    acquisition = ismrmrd.Acquisition.from_array(np.ones((2, 8), np.complex64))
    with running(configured(library, record=tmp_path / "recorded")) as service:
        asked(service.port, [waveform, acquisition, sent], parameters=told)
        (file,) = (tmp_path / "recorded").iterdir()
        wait_until(lambda: file.read_bytes().endswith(struct.pack("<H", 4)))
        recorded = file.read_bytes()
        for name in (b"DOE", b"JANE", b"4711", b"MR01", b"t2_spine", struct.pack("<I", 987654)):
            assert name not in recorded
        assert b"EchoTime" in recorded
        assert b"cartesian" in recorded
        assert file.stat().st_mode & 0o777 == 0o600
        found = replay(file, "127.0.0.1", service.port)
    assert found["images"] == {"1": 1, "1000": 1}
    assert found["other"] == 2
    assert found["closed"]


def test_rules_choose_by_what_the_scanner_says(library: Path) -> None:
    recipe = {"k": 1, "engine": "fake"}
    rules = [
        {"name": "a", "library": library, "recipe": recipe, "when": when}
        for when in [{"series_description": "*t2*", "sender": "MR01", "called": "spine"}]
    ]
    rules.append({**rules[0], "name": "b", "when": {"parameters": {"organ": "disc"}}})
    sent = [image_of(half_volume(1)[0])]
    with running(configured(library, rules=rules)) as service:
        assert len(images_in(asked(service.port, sent, config="spine.xml"))) == 2
        nothing = asked(service.port, sent, config="other")
        assert len(images_in(nothing)) == 1
        assert "no rule fits" in " ".join(texts_in(nothing))
        both = json.dumps({"parameters": {"organ": "disc"}})
        assert len(images_in(asked(service.port, sent, config="spine", parameters=both))) == 3
        assert len(images_in(asked(service.port, sent, config="b"))) == 2


def test_a_slow_sender_is_not_waited_for(library: Path) -> None:
    raw = struct.pack("<H", 1022) + image_of(half_volume(1)[0]).to_bytes()
    with (
        running(configured(library, message_s=1)) as service,
        socket.create_connection(("127.0.0.1", service.port), 300) as link,
    ):
        link.sendall(raw + raw[:3000])
        begin = time.monotonic()
        came = b"".join(iter(lambda: link.recv(65536), b""))
        assert time.monotonic() - begin < 50  # a minute unless told otherwise
    assert came.startswith(raw)
    assert b"nothing more came in time" in came
    assert came.endswith(struct.pack("<H", 4))


def test_every_segmentation_is_in_the_audit_log(library: Path, tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    with running(configured(library, audit={"log": audit})) as service:
        asked(service.port, [image_of(half_volume(1)[0]), image_of(half_volume(2)[None])])
    assert verify_audit_log(audit).entries == 2
    assert "DOE" not in audit.read_text()
    assert "t2_spine" not in audit.read_text()


@pytest.mark.skipif(
    shutil.which("ismrmrd_recon_cartesian_2d") is None,
    reason="ISMRMRD's programs (Debian: ismrmrd-tools) are not here",
)
def test_a_measurement_made_by_ismrmrds_own_programs(service: Mrd, tmp_path: Path) -> None:
    """Raw data, and an image that does not say how the patient lay."""
    file = tmp_path / "phantom.h5"
    make = ["ismrmrd_generate_cartesian_shepp_logan", "-o", str(file), "-m", "64", "-c", "2"]
    for command in (make, ["ismrmrd_recon_cartesian_2d", str(file)]):
        subprocess.run(command, check=True, capture_output=True)
    with ismrmrd.Dataset(str(file), "dataset", create_if_needed=False) as data:
        header = data.read_xml_header().decode()
        measured = [data.read_acquisition(n) for n in range(data.number_of_acquisitions())]
        image = data.read_image("cpp", 0)
    found = asked(service.port, [*measured, image], header=header)
    passed = [each for each in found if isinstance(each, ismrmrd.Acquisition)]
    assert [each.to_bytes() for each in passed] == [each.to_bytes() for each in measured]
    original, mask = images_in(found)
    assert original.to_bytes() == image.to_bytes()
    assert mask.data.shape == image.data.shape
    assert same_place(mask, image)
    assert "how the patient lay" in " ".join(texts_in(found))
