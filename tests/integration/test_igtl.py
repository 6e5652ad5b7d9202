"""OpenIGTLink with pyigtl, and with OpenIGTLink's own examples in C++."""

from __future__ import annotations

import random
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import crcmod
import numpy as np
import pyigtl
import pytest
from support.igtl import PLACE, next_of, raw_client, running, sent
from support.services import half_library, half_volume, wait_until, what_comes_to_the_end

from recallseg import Bundle, Library
from recallseg.runtime.services.igtl import wire
from recallseg.runtime.services.igtl.checksum import crc64
from recallseg.runtime.services.igtl.service import Igtl
from recallseg.runtime.services.igtl.wire import make

EXAMPLES = Path("/usr/share/doc/openigtlink-examples/examples")


@pytest.fixture(scope="module")
def library(fake_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_library(tmp_path_factory.mktemp("igtl") / "lib", fake_bundle)


@pytest.fixture(scope="module")
def service(library: Path) -> Iterator[Igtl]:
    with running(library) as service:
        yield service


@contextmanager
def client(port: int) -> Iterator[pyigtl.OpenIGTLinkClient]:
    made = pyigtl.OpenIGTLinkClient("127.0.0.1", port)
    try:
        wait_until(made.is_connected)
        yield made
    finally:
        made.stop()


@pytest.mark.parametrize("size", [0, 1, 7, 255, 256, 257, 4096, 70_001])
def test_checksums_are_crcmods(size: int) -> None:
    data = random.Random(size).randbytes(size)
    other = crcmod.mkCrcFun(0x142F0E1EBA9EA3693, rev=False, initCrc=0, xorOut=0)
    assert crc64(data) == other(data)


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "float32", "float64"]
)
def test_frames_of_all_types_come_back_as_label_maps_at_the_same_place(
    service: Igtl, dtype: str
) -> None:
    frame = (half_volume(1) // 2).astype(dtype)
    with client(service.port) as one:
        one.send_message(sent(frame))
        answer = one.wait_for_message("Image-mask", timeout=120)
    assert answer.message_type == "IMAGE"
    assert answer.image.dtype == np.uint8
    assert answer.image.shape == (1, 64, 64)
    assert answer.image[0, :30].all()
    assert not answer.image[0, 34:].any()
    assert np.allclose(answer.ijk_to_world_matrix, PLACE)
    assert answer.world_coordinate_system == "lps"


def test_voxels_with_the_most_significant_byte_first(service: Igtl) -> None:
    """Which pyigtl can read, but not send."""
    body = bytearray(sent(half_volume(1)).pack()[58:])
    body[4] = 1
    body[72:] = np.frombuffer(bytes(body[72:]), "<u2").astype(">u2").tobytes()
    with raw_client(service.port) as one:
        one.sendall(make("IMAGE", "Big", bytes(body)).raw)
        answer = wire.Image.of(next_of(one, "IMAGE", "Big-mask").content)
    assert answer.array[0, :30].all()
    assert not answer.array[0, 34:].any()


def test_colour_and_long_names(service: Igtl) -> None:
    frame = np.repeat((half_volume(1)).astype(np.uint8)[..., None], 3, axis=-1)
    with client(service.port) as one:
        one.send_message(sent(frame, "A device of 20 bytes"))
        answer = one.wait_for_message("A device of 20 -mask", timeout=120)
    assert answer.image.shape == (1, 64, 64)
    assert answer.image[0, :30].all()


@pytest.mark.parametrize("system", ["lps", "ras"])
def test_volumes_are_turned_upright_and_their_masks_turned_back(service: Igtl, system: str) -> None:
    """On screen the front is up: in LPS rows run to the back, in RAS to the front."""
    place = np.diag([1.0, 1.0, 3.0, 1.0])
    volume = half_volume(4)
    if system == "ras":
        place[0, 0] = place[1, 1] = -1
    upside_down = place.copy()
    upside_down[1, 1] *= -1
    with client(service.port) as one:
        one.send_message(sent(volume, "up", place, world_coordinate_system=system))
        up = one.wait_for_message("up-mask", timeout=120)
        flipped = np.ascontiguousarray(volume[:, ::-1])
        one.send_message(sent(flipped, "down", upside_down, world_coordinate_system=system))
        down = one.wait_for_message("down-mask", timeout=120)
    assert up.image.shape == (4, 64, 64)
    assert up.image[:, :30].all()
    assert not up.image[:, 34:].any()
    assert down.image[:, 34:].all()
    assert not down.image[:, :30].any()
    assert np.allclose(down.ijk_to_world_matrix, upside_down)
    assert down.world_coordinate_system == system


def test_what_labels_mean_is_told_also_to_who_comes_later(service: Igtl) -> None:
    with raw_client(service.port) as one:
        one.sendall(sent(half_volume(1), "Told").pack())
        told = next_of(one, "LBMETA", "Told-mask")
        mask = next_of(one, "IMAGE", "Told-mask")
        content = bytes(told.content)
        assert len(content) == 116
        assert content[:64].rstrip(b"\0") == b"half"
        assert content[64:84].rstrip(b"\0") == b"Told-mask"
        assert content[84] == wire.Image.of(mask.content).array.max() == 1
        assert struct.unpack(">3H", content[90:96]) == (64, 64, 1)
        assert content[96:].rstrip(b"\0") == b"Told"
    with raw_client(service.port) as later:
        assert next_of(later, "LBMETA", "Told-mask").content == told.content
        later.sendall(make("GET_STATUS", "x", b"").raw)
        assert struct.unpack_from(">H", next_of(later, "STATUS").content) == (1,)


def test_transforms_and_others_are_passed_on_as_they_came(service: Igtl) -> None:
    move = np.eye(4)
    move[:3, 3] = 1, 2, 3
    message = pyigtl.TransformMessage(move, device_name="Probe")
    message.header_version = 2
    message.metadata = {"status": "ok"}
    with raw_client(service.port) as one, client(service.port) as two:
        other = pyigtl.StringMessage("hello", device_name="Text")
        wait_until(lambda: len(service._peers) == 2)
        one.sendall(message.pack() + other.pack())
        got = two.wait_for_message("Probe", timeout=120)
        assert two.wait_for_message("Text", timeout=120).string == "hello"
    assert (got.matrix == move).all()
    assert got.metadata == {"status": "ok"}


def test_a_frame_with_metadata_of_version_three(service: Igtl) -> None:
    message = sent(half_volume(1), "Three")
    message.header_version, message.metadata = 2, {"depth": "50"}
    with client(service.port) as one:
        one.send_message(message)
        assert one.wait_for_message("Three-mask", timeout=120).image[0, :30].all()


def test_as_client_it_follows_a_source_and_answers_viewers(library: Path) -> None:
    source = pyigtl.OpenIGTLinkServer(port=_free(), local_server=True)
    try:
        with running(library, source={"port": source.port, "retry_s": 0.1}) as service:
            wait_until(source.is_connected)
            with client(service.port) as viewer:
                wait_until(lambda: len(service._peers) == 2)
                source.send_message(sent(half_volume(1), "US"))
                assert viewer.wait_for_message("US-mask", timeout=120).image[0, :30].all()
                assert viewer.wait_for_message("US", timeout=120).image.shape == (1, 64, 64)
    finally:
        source.stop()


def test_the_newest_frame_wins_and_late_ones_are_told(library: Path) -> None:
    with running(library, deadline_ms=0.001) as service, raw_client(service.port) as one:
        for _ in range(20):
            one.sendall(sent(half_volume(1), "Fast").pack())
        told = next_of(one, "STATUS", "Fast-mask")
        assert struct.unpack_from(">H", told.content) == (7,)


def test_a_library_that_is_added_to_is_asked_as_it_is(
    fake_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recallseg.runtime.services.igtl.frames.LOOK_S", 0.0)
    path = half_library(tmp_path / "lib", fake_bundle)
    with running(path) as service, raw_client(service.port) as one:
        one.sendall(sent(half_volume(1), "A").pack())
        assert len(next_of(one, "LBMETA", "A-mask").content) == 116
        next_of(one, "IMAGE", "A-mask")
        with Library.open(path, mode="write", engine="fake") as library:
            library.add(half_volume(1, seed=3)[0], {"other": half_volume(1, seed=3)[0] > 100})
        one.sendall(sent(half_volume(1), "A").pack())
        assert len(next_of(one, "LBMETA", "A-mask").content) == 232
        path.rename(tmp_path / "gone")
        one.sendall(sent(half_volume(1), "A").pack())
        told = next_of(one, "STATUS", "RecallSeg")
        assert b"no library" in bytes(told.content)
        monkeypatch.setattr("recallseg.runtime.services.igtl.frames.LOOK_S", 1e9)
        one.sendall(sent(half_volume(1), "A").pack())  # nor is it asked without another look
        assert b"no library" in bytes(next_of(one, "STATUS", "RecallSeg").content)
        (tmp_path / "gone").rename(path)
        one.sendall(sent(half_volume(1), "A").pack())
        next_of(one, "IMAGE", "A-mask")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda body: body[:40], b"cut off"),
        (lambda body: body[:-1], b"bytes of voxels"),
        (lambda body: body[:6] + b"\xff\xff" + body[8:], b"are not read"),
        (lambda body: body[:3] + b"\x09" + body[4:], b"is not one"),
        (lambda body: body[:2] + b"\x02" + body[3:], b"1 or 3 values"),
        (lambda body: body[:60] + b"\0\1" + body[62:], b"parts of images"),
    ],
)
def test_wrong_images_are_told_and_the_connection_goes_on(
    service: Igtl, damage: Any, told: bytes
) -> None:
    body = sent(half_volume(1)).pack()[58:]
    with raw_client(service.port) as one:
        one.sendall(make("IMAGE", "Bad", damage(body)).raw)
        assert told in bytes(next_of(one, "STATUS", "RecallSeg").content)
        one.sendall(sent(half_volume(1), "Good").pack())
        next_of(one, "IMAGE", "Good-mask")


def test_a_wrong_checksum_is_told(service: Igtl) -> None:
    raw = bytearray(sent(half_volume(1), "Bad").pack())
    raw[-1] ^= 1
    with raw_client(service.port) as one:
        one.sendall(raw)
        told = next_of(one, "STATUS", "RecallSeg")
    assert struct.unpack_from(">H", told.content) == (9,)


def test_hostile_headers_end_and_others_are_served(service: Igtl) -> None:
    chance = random.Random(3)
    good = sent(half_volume(1), "Hostile").pack()
    for number in range(150):
        head = bytearray(good[:58])
        if number % 3 == 0:
            struct.pack_into(">Q", head, 42, chance.choice([2**63, 2**64 - 1, 2**40, 2**29]))
        elif number % 3 == 1:
            head = bytearray(chance.randbytes(58))
        else:
            head = bytearray(good[: chance.randrange(len(good))])
        with raw_client(service.port) as one:
            one.sendall(head)
            what_comes_to_the_end(one)
    with client(service.port) as one:
        one.send_message(sent(half_volume(1), "After"))
        assert one.wait_for_message("After-mask", timeout=120).image[0, :30].all()
    assert service.alive()


def test_who_does_not_read_holds_up_nobody(service: Igtl) -> None:
    with raw_client(service.port) as silent, client(service.port) as one:
        wait_until(lambda: len(service._peers) == 2)
        big = np.zeros((1, 512, 512), np.uint16)
        for _ in range(40):
            one.send_message(sent(big, "Big"), wait=True)
        one.send_message(sent(half_volume(1), "Small"))
        assert one.wait_for_message("Small-mask", timeout=120).image[0, :30].all()
        assert silent.fileno() > 0


@pytest.mark.skipif(
    not EXAMPLES.is_dir() or shutil.which("cmake") is None,
    reason="OpenIGTLink's examples (Debian: openigtlink-examples, libopenigtlink-dev) are not here",
)
def test_openigtlinks_own_examples_in_c(service: Igtl, tmp_path: Path) -> None:
    """Its ImagerClient sends images, and its ReceiveClient reads what is answered."""
    code = tmp_path / "code"
    code.mkdir()
    shutil.copy(EXAMPLES / "Imager" / "ImagerClient.cxx", code)
    shutil.copy(EXAMPLES / "Receiver" / "ReceiveClient.cxx", code)
    (code / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.5)\nproject(examples)\n"
        "find_package(OpenIGTLink REQUIRED)\ninclude(${OpenIGTLink_USE_FILE})\n"
        "foreach(name ImagerClient ReceiveClient)\n  add_executable(${name} ${name}.cxx)\n"
        "  target_link_libraries(${name} OpenIGTLink)\nendforeach()\n"
    )
    for command in (["cmake", "-S", code, "-B", code], ["cmake", "--build", code]):
        subprocess.run(command, check=True, capture_output=True)
    heard = (tmp_path / "heard.txt").open("w")
    receiver = subprocess.Popen(
        [code / "ReceiveClient", "127.0.0.1", str(service.port)], stdout=heard, stderr=heard
    )
    wait_until(lambda: len(service._peers) == 1)
    imager = subprocess.Popen(
        [code / "ImagerClient", "127.0.0.1", str(service.port), "5", EXAMPLES / "Imager" / "img"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with client(service.port) as one:
            answer = one.wait_for_message("ImagerClient-mask", timeout=120)
            original = one.wait_for_message("ImagerClient", timeout=120)
        assert answer.image.shape == original.image.shape
        wait_until(lambda: (tmp_path / "heard.txt").read_text().count("IMAGE") > 3)
    finally:
        for each in (imager, receiver):
            each.kill()
            each.wait()
        heard.close()
    told = (tmp_path / "heard.txt").read_text()
    assert "ImagerClient-mask" in told
    time.sleep(0.1)


def _free() -> int:
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        return int(link.getsockname()[1])
