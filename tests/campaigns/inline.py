"""MRD and OpenIGTLink under load and among hostile peers, each service in a process of its own.

    PYTHONPATH=tests python -m campaigns.inline mrd --count 20
    PYTHONPATH=tests python -m campaigns.inline mrd-hostile --count 1000
    PYTHONPATH=tests python -m campaigns.inline igtl --count 200
    PYTHONPATH=tests python -m campaigns.inline igtl-hostile --count 10000

Rates and ages are of the demo model on images of 512 px, beside the segmenter's own in the same run
on the same machine. Exit status 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyigtl
from ismrmrd.serialization import ProtocolDeserializer
from support.dicom_peers import free_port
from support.fake_bundle import make_fake_bundle
from support.mrd import asked, image_of
from support.services import half_library, half_volume, what_comes_to_the_end

from campaigns.turns import (
    SIDE,
    Turn,
    children_of,
    in_turn,
    pictures,
    processor_ms,
    processors_of,
    rate,
    ratios,
    segmenter_alone,
)
from recallseg import Library, Segmenter
from recallseg.runtime.services.igtl import wire

ROUNDS = 15
CLOSE = struct.pack("<H", 4)


@contextmanager
def served(folder: Path, service: str, *, fake: bool, **settings: Any) -> Iterator[int]:
    """Run ``recallseg mrd`` or ``igtl``; give the port; it must end in time when it is told to."""
    port, metrics = free_port(), free_port()
    os.environ["RECALLSEG_STATE"] = str(folder / "own")
    os.environ.setdefault("RECALLSEG_CACHE", str(folder / "cache"))
    library, engine = folder / "library", "fake" if fake else "onnxruntime-cpu"
    if not library.exists():
        if fake:
            half_library(library, make_fake_bundle(folder / "fake"))
        else:
            pixels = half_volume(1, SIDE)[0]
            with Library.create(library, "demo") as made:
                made.add(pixels, {"half": pixels > 100})
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
    (folder / "conf.toml").write_text(
        f'[log]\nlevel = "error"\n[metrics]\nport = {metrics}\n'
        '[[rules]]\nname = "half"\nlibrary = "library"\n'
        f'recipe = {{ k = 1, engine = "{engine}" }}\n'
        f"[{service}]\nport = {port}\n{lines}\n"
    )
    command = [sys.executable, "-m", "recallseg", service, "--config", str(folder / "conf.toml")]
    with (folder / "service.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        _ready(process, metrics)
        yield port
        assert process.poll() is None, "the service has ended"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def _ready(process: subprocess.Popen[bytes], metrics: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/readyz") as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError("the service is not ready")


def process_of_service() -> int:
    """Return the number of the process that was started; it may have started others."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if b"conf.toml" in command.read_bytes():
                return int(command.parent.name)
    raise AssertionError("there is no service")


def memory_of() -> int:
    """Return the resident bytes of the service, without the process that segments."""
    status = Path(f"/proc/{process_of_service()}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def alone(folder: Path, count: int, fake: bool = False) -> list[float]:
    """Return what the segmenter itself takes for images, in seconds."""
    took = []
    with Segmenter(folder / "library", k=1, engine="fake" if fake else None) as segmenter:
        segmenter.warm_up()
        for number in range(count):
            pixels = half_volume(1, SIDE, number)[0]
            begin = time.perf_counter()
            segmenter.segment(pixels)
            took.append(time.perf_counter() - begin)
    return took


def mrd(folder: Path, count: int) -> dict[str, Any]:
    """Rate beside the segmenter's own, and what passing on takes, idle and while segmenting."""
    found: dict[str, Any] = {}
    images = [image_of(each, index=n) for n, each in enumerate(pictures(count))]
    with (
        served(folder, "mrd", fake=False, deadline_s=60) as port,
        segmenter_alone(folder / "library", count) as own,
    ):
        service = process_of_service()
        (segmenting,) = children_of(service)

        def ours() -> Turn:
            def spent() -> list[float]:
                return [time.process_time(), processors_of(service), processors_of(segmenting)]

            before, begin = spent(), time.perf_counter()
            answers = asked(port, images)
            seconds = time.perf_counter() - begin
            assert len(answers) == 2 * count
            names = ("client", "passing on", "segmenting")
            took = (two - one for one, two in zip(before, spent(), strict=True))
            return Turn(seconds, dict(zip(names, took, strict=True)))

        own(), ours()
        alone, served_ = in_turn(ROUNDS, own, ours)
        rates = ratios(alone, served_)
        found["rate beside the segmenter's own, quartiles"] = rates
        found["images a second"] = {
            "segmenter": rate(alone, count),
            "service": rate(served_, count),
        }
        found["ms of processors an image"] = processor_ms(alone, count) | processor_ms(
            served_, count
        )
        found["passing on, idle, ms"] = _passing(port, images[0], 300)
        with echoed() as echo:
            found["bare echo in a process of its own, idle, ms"] = _passing(echo, None, 300)
        stop = threading.Event()

        def busy() -> None:
            while not stop.is_set():
                asked(port, images[:10])

        thread = threading.Thread(target=busy)
        thread.start()
        time.sleep(1)
        found["passing on, while segmenting, ms"] = _passing(port, images[0], 300)
        with echoed() as echo:
            found["bare echo, while segmenting, ms"] = _passing(echo, None, 300)
        stop.set()
        thread.join()
    found["broken"] = int(rates[1] < 0.9)
    return found


ECHO = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("ready", flush=True)
link, _ = server.accept()
while part := link.recv(2**20):
    link.sendall(part)
"""


@contextmanager
def echoed() -> Iterator[int]:
    """Run what does nothing but send back: what this machine and its load take by themselves."""
    port = free_port()
    command = [sys.executable, "-c", ECHO, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield port
        finally:
            process.kill()


def _passing(port: int, image: Any, count: int) -> dict[str, float]:
    """Send phase images, which are passed on only, every 20 ms; return percentiles in ms.

    None for an image: to an echo.
    """
    sent = image or image_of(half_volume(1, SIDE)[0])
    head = sent.getHead()
    head.image_type = 2
    sent.setHead(head)
    raw = struct.pack("<H", 1022) + sent.to_bytes()
    took = []
    with socket.create_connection(("127.0.0.1", port), 20) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = bytearray(len(raw))
        if image is not None:
            link.sendall(raw)
            came = ProtocolDeserializer(link.makefile("rb")).deserialize()
            next(came), next(came)  # with the text that says why it is not segmented
        for _ in range(count):
            begin = time.perf_counter()
            sender = threading.Thread(target=link.sendall, args=(raw,))
            sender.start()
            view = memoryview(buffer)
            while view:
                view = view[link.recv_into(view) :]
            took.append((time.perf_counter() - begin) * 1e3)
            assert buffer == raw
            sender.join()
            time.sleep(0.02)
    return _percentiles(took)


def _percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 2) for p in (50, 95, 99)}


def mrd_hostile(folder: Path, count: int) -> dict[str, Any]:
    """Random, damaged and truncated streams: each ends with CLOSE, and others are answered."""
    chance = random.Random(1)
    sent = image_of(half_volume(1)[0])
    whole = struct.pack("<H", 1) + bytes(1024) + struct.pack("<H", 1022) + sent.to_bytes() + CLOSE
    broken = 0
    with served(folder, "mrd", fake=True, message_s=2, most_bytes=2**26) as port:
        begin = most = memory_of()
        for number in range(count):
            stream = bytearray(whole)
            for _ in range(chance.randrange(1, 20)):
                stream[chance.randrange(1300)] = chance.randrange(256)
            if number % 3 == 1:
                stream = bytearray(whole[: chance.randrange(len(whole))])
            elif number % 3 == 2:
                stream = bytearray(chance.randbytes(chance.randrange(1, 5000)))
            with socket.create_connection(("127.0.0.1", port), 20) as link:
                link.settimeout(30)
                came = b""
                try:
                    link.sendall(stream)
                    came = what_comes_to_the_end(link)
                except OSError:
                    came = b""
            broken += not came.endswith(CLOSE)
            if number % 100 == 0:
                broken += len(asked(port, [sent])) != 2
                most = max(most, memory_of())
        broken += len(asked(port, [sent])) != 2
        grown = max(most, memory_of()) - begin
    return {"streams": count, "memory grew, MB": round(grown / 1e6, 1), "broken": int(broken)}


def igtl(folder: Path, count: int) -> dict[str, Any]:
    """Frames in and out a second, and how old results are, beside the segmenter's own time."""
    found = _frames(folder / "demo", count, fake=False)
    swift = _frames(folder / "fake", count, fake=True)
    found["with an engine that takes no time"] = swift
    found["broken"] = int(swift["label maps a second"] < 19)
    return found


def _frames(folder: Path, count: int, *, fake: bool) -> dict[str, Any]:
    folder.mkdir()
    found: dict[str, Any] = {}
    frames = [half_volume(1, SIDE, n).astype(np.uint8) for n in range(20)]
    with served(folder, "igtl", fake=fake, deadline_ms=5000) as port:
        own = statistics.median(alone(folder, 40, fake)) * 1e3
        rate = 20.0
        with socket.create_connection(("127.0.0.1", port), 20) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ages: list[float] = []
            sent: dict[int, float] = {}

            def hear() -> None:
                while True:
                    message = wire.read(link, idle_s=10, message_s=10, most_bytes=2**28)
                    if message.type == "IMAGE":
                        ages.append((time.perf_counter() - sent[message.timestamp]) * 1e3)

            thread = threading.Thread(target=_until_closed, args=(hear,), daemon=True)
            thread.start()
            begin = time.perf_counter()
            for number in range(count):
                message = pyigtl.ImageMessage(
                    frames[number % 20], device_name="Image", timestamp=1e9 + number
                )
                raw = message.pack()
                stamp = struct.unpack_from(">Q", raw, 34)[0]
                wait = begin + number / rate - time.perf_counter()
                if wait > 0:
                    time.sleep(wait)
                sent[stamp] = time.perf_counter()
                link.sendall(raw)
            spent = time.perf_counter() - begin
            time.sleep(1.0)
        thread.join(5)
    ages = ages[5:]
    found["frames sent a second"] = round(count / spent, 1)
    found["label maps a second"] = round(len(ages) / spent, 1)
    found["a query's median, ms"] = round(own, 1)
    found["age, ms"] = _percentiles(ages)
    found["age p99 beside a query's median"] = round(float(np.percentile(ages, 99)) / own, 2)
    return found


def _until_closed(do: Any) -> None:
    with suppress(wire.ClosedError, OSError):
        do()


def igtl_hostile(folder: Path, count: int) -> dict[str, Any]:
    """Headers that lie: memory stays bounded, and another client is answered all the while."""
    chance = random.Random(2)
    good = pyigtl.ImageMessage(half_volume(1), device_name="Good").pack()
    body = good[58:]
    broken = 0
    with (
        served(folder, "igtl", fake=True, message_s=1, most_bytes=2**26) as port,
        socket.create_connection(("127.0.0.1", port), 20) as other,
    ):
        begin = memory_of()
        for number in range(count):
            raw = bytearray(good)
            if number % 4 == 0:
                struct.pack_into(">Q", raw, 42, chance.choice([2**63, 2**40, 2**64 - 1, 2**25]))
            elif number % 4 == 1:
                raw = bytearray(chance.randbytes(58 + chance.randrange(100)))
            elif number % 4 == 2:
                raw = raw[: chance.randrange(len(raw))]
            else:
                damaged = bytearray(body)
                for _ in range(chance.randrange(1, 10)):
                    damaged[chance.randrange(72)] = chance.randrange(256)
                raw = bytearray(wire.make("IMAGE", "Bad", bytes(damaged)).raw)
            with socket.create_connection(("127.0.0.1", port), 20) as link:
                link.settimeout(20)
                try:
                    link.sendall(raw)
                    what_comes_to_the_end(link)
                except ConnectionError:
                    pass
                except TimeoutError:
                    broken += 1
            if number % 100 == 0:
                other.sendall(good)
                while True:
                    heard = wire.read(other, idle_s=20, message_s=20, most_bytes=2**28)
                    if heard.device == "Good-mask" and heard.type == "IMAGE":
                        break
        grown = memory_of() - begin
    return {"headers": count, "memory grew, MB": round(grown / 1e6, 1), "broken": broken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    runs = {"mrd": mrd, "mrd-hostile": mrd_hostile, "igtl": igtl, "igtl-hostile": igtl_hostile}
    parser.add_argument("what", choices=tuple(runs))
    parser.add_argument("--count", type=int, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="inline-campaign-") as folder:
        try:
            found = runs[given.what](Path(folder), given.count)
        except BaseException:
            log = Path(folder) / "service.log"
            print(log.read_text()[-5000:] if log.exists() else "no log", file=sys.stderr)
            raise
        print(json.dumps(found, indent=1))
    sys.exit(found["broken"] > 0)


if __name__ == "__main__":
    main()
