"""A DICOM node under load, killed, without room, and among hostile peers.

    PYTHONPATH=tests python -m campaigns.node kills --count 300
    PYTHONPATH=tests python -m campaigns.node load --objects 10000 --associations 50
    PYTHONPATH=tests python -m campaigns.node hostile --count 10000
    PYTHONPATH=tests python -m campaigns.node latency --series 20

Needs dcmtk and Orthanc. Exit status 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pydicom
from support.dicom_peers import Orthanc, free_port, orthanc, program
from support.dicom_series import write_series
from support.fake_bundle import make_fake_bundle
from support.services import half_library, half_volume


class Place:
    """A folder with a library and a configuration, and the node's process."""

    def __init__(self, folder: Path, pacs_port: int, **node: Any) -> None:
        self.folder, self.port, self.metrics = folder, free_port(), free_port()
        os.environ["RECALLSEG_STATE"] = str(folder / "own")
        os.environ["RECALLSEG_CACHE"] = str(folder / "cache")
        half_library(folder / "library", make_fake_bundle(folder / "fake"))
        settings = {"quiet_s": 0.5, "reserve_bytes": 0, "most_clients": 100, **node}
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        (folder / "node.toml").write_text(
            f'state = "state"\nstop_s = 20\n[metrics]\nport = {self.metrics}\n'
            '[log]\nlevel = "warning"\n'
            '[[rules]]\nname = "half"\nlibrary = "library"\ndestinations = ["pacs"]\n'
            'recipe = { k = 1, engine = "fake" }\n'
            f"[node]\nport = {self.port}\n" + "\n".join(lines) + "\n"
            "[node.retry]\nfirst_s = 0.2\nmost_s = 1\n"
            '[node.destinations.pacs]\ntype = "dicom"\nhost = "127.0.0.1"\nae_title = "ORTHANC"\n'
            f"port = {pacs_port}\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self.folder / "node.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "recallseg", "node", "--config", str(self.folder / "node.toml")],
            stderr=log,
        )
        log.close()

    def ready(self, seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/readyz", timeout=5):
                    return
            except OSError:
                assert time.monotonic() < end, (self.folder / "node.log").read_text()
                assert self.process is not None
                assert self.process.poll() is None, (self.folder / "node.log").read_text()
                time.sleep(0.05)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)

    def status(self) -> Any:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "recallseg", "node", "status", "--json"),
                *("--config", str(self.folder / "node.toml")),
            ],
            capture_output=True,
            check=True,
        )
        return json.loads(done.stdout)

    def resident_mb(self) -> float:
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(each for each in status.splitlines() if each.startswith("VmRSS"))
        return int(line.split()[1]) / 1e3

    def send(self, *files: Path, seconds: float = 60) -> bool:
        """Send by storescu; whether every object was acknowledged."""
        try:
            done = subprocess.run(
                [
                    *(program("storescu"), "-to", "10", "-td", "30", "-ta", "30"),
                    *("-aec", "RECALLSEG", "127.0.0.1", str(self.port), *map(str, files)),
                ],
                capture_output=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def answered(pacs: Orthanc) -> dict[str, set[int]]:
    """Frames of the SEGs that an archive holds, by the series that they refer to."""
    found: dict[str, set[int]] = {}
    for each in pacs.instances("SEG"):
        tags = pacs.get(f"/instances/{each['ID']}/simplified-tags")
        series = tags["ReferencedSeriesSequence"][0]["SeriesInstanceUID"]
        found.setdefault(series, set()).add(int(tags["NumberOfFrames"]))
    return found


def settle(place: Place, pacs: Orthanc, wanted: dict[str, int], seconds: float) -> list[str]:
    """Wait until every series is answered whole; return those that are not."""
    end = time.monotonic() + seconds
    while True:
        frames = answered(pacs)
        missing = [uid for uid, count in wanted.items() if count not in frames.get(uid, set())]
        if not missing or time.monotonic() > end:
            return missing
        time.sleep(1)


def kills(folder: Path, count: int, most_s: float = 3.0, minutes: float = 600) -> dict[str, Any]:
    chance = random.Random(1)
    slices = 3
    with orthanc(folder / "pacs") as pacs:
        place = Place(folder, pacs.dicom_port)
        acknowledged: dict[str, int] = {}
        stop = threading.Event()
        sends = [0, 0]

        def sender(number: int) -> None:
            made = 0
            while not stop.is_set():
                where = folder / "out" / f"{number}-{made}"
                files = write_series(where, half_volume(slices, seed=number * 10**6 + made))
                uid = str(pydicom.dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID)
                while not stop.is_set():
                    sends[0] += 1
                    if place.send(*files):
                        acknowledged[uid] = slices
                        break
                    sends[1] += 1
                    stop.wait(0.3)
                shutil.rmtree(where)
                made += 1
                stop.wait(2.0)

        place.start()
        place.ready()
        took = time.monotonic()
        senders = [threading.Thread(target=sender, args=(n,), daemon=True) for n in range(2)]
        for each in senders:
            each.start()
        number = -1
        while number + 1 < count and time.monotonic() - took < minutes * 60:
            number += 1
            if chance.random() < 0.8:  # else while it starts, and takes up what was there
                place.ready()
            time.sleep(chance.uniform(0.0, most_s))
            place.kill()
            place.start()
            if (number + 1) % 20 == 0:
                print(number + 1, "kills", len(acknowledged), "acknowledged", flush=True)
        place.ready()
        stop.set()
        for each in senders:
            each.join()
        missing = settle(place, pacs, acknowledged, 900)
        frames = answered(pacs)
        instances = len(pacs.instances("SEG"))
        status = place.status()
        exit_status = place.stop()
        return {
            "kills": number + 1,
            "minutes": round((time.monotonic() - took) / 60, 1),
            "sends": sends[0],
            "sends that failed": sends[1],
            "acknowledged series": len(acknowledged),
            "answered series": len(frames),
            "distinct SEG instances": instances,
            "acknowledged and not answered": len(missing),
            "status": status["counts"],
            "exit": exit_status,
            "broken": bool(missing),
        }


def load(folder: Path, objects: int, associations: int) -> dict[str, Any]:
    per = objects // associations
    with orthanc(folder / "pacs") as pacs:
        place = Place(folder, pacs.dicom_port, quiet_s=2.0)
        place.start()
        place.ready()
        wanted, batches = {}, []
        for number in range(associations):
            files = write_series(folder / "out" / str(number), half_volume(per, seed=number))
            uid = str(pydicom.dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID)
            wanted[uid] = per
            batches.append(files)
        begin = time.monotonic()
        with ThreadPoolExecutor(associations) as pool:
            taken = list(pool.map(lambda files: place.send(*files, seconds=1800), batches))
        took = time.monotonic() - begin
        memory = place.resident_mb()
        here = len(list((folder / "state" / "received").rglob("*.dcm")))
        missing = settle(place, pacs, wanted, 900)
        exit_status = place.stop()
        return {
            "objects": per * associations,
            "associations": associations,
            "acknowledged associations": sum(taken),
            "objects on the disk": here,
            "seconds": round(took, 1),
            "objects a second": round(per * associations / took, 1),
            "resident MB": memory,
            "series not answered": len(missing),
            "exit": exit_status,
            "broken": bool(missing) or here != per * associations or not all(taken),
        }


def hostile(folder: Path, count: int) -> dict[str, Any]:
    """Send PDUs of every kind of damage; meanwhile others are served."""
    chance = random.Random(2)
    request = association_request()
    with orthanc(folder / "pacs") as pacs:
        place = Place(folder, pacs.dicom_port, idle_s=3.0)
        place.start()
        place.ready()
        files = write_series(folder / "out", half_volume(3))
        place.send(*files)
        while not pacs.instances():  # what segmenting takes is not of the hostile
            time.sleep(0.2)
        before = most = place.resident_mb()
        sent, served, refused, waits = 0, 0, 0, []
        slow: list[socket.socket] = []
        while sent < count:
            for _ in range(100):
                sent += 1
                try:
                    link = socket.create_connection(("127.0.0.1", place.port), timeout=5)
                except OSError:
                    refused += 1
                    continue
                try:
                    link.sendall(hostile_bytes(chance, request))
                except OSError:
                    refused += 1
                if chance.random() < 0.02:
                    slow.append(link)  # says no more, and does not go
                else:
                    link.close()
            for link in slow[:-20]:
                link.close()
            slow = slow[-20:]
            begin = time.monotonic()
            if place.send(*files):
                served += 1
                waits.append(time.monotonic() - begin)
            most = max(most, place.resident_mb())
            if sent % 2000 == 0:
                print(sent, "sent", round(most - before), "MB more", served, "served", flush=True)
        asked = sent // 100
        for link in slow:
            link.close()
        exit_status = place.stop()
        return {
            "hostile connections": sent,
            "refused at once": refused,
            "honest senders served meanwhile": f"{served} of {asked}",
            "seconds of an honest sender, median and most": [
                round(statistics.median(waits), 2),
                round(max(waits), 2),
            ],
            "resident MB before and at most": [before, most],
            "exit": exit_status,
            "broken": most - before > 300 or served < asked * 0.98,
        }


def association_request() -> bytes:
    """Return an honest A-ASSOCIATE-RQ, from PS3.8, for Verification and MR."""

    def item(kind: int, data: bytes) -> bytes:
        return struct.pack(">BxH", kind, len(data)) + data

    contexts = b"".join(
        item(0x20, bytes([1 + 2 * n, 0, 0, 0]) + item(0x30, uid) + item(0x40, b"1.2.840.10008.1.2"))
        for n, uid in enumerate((b"1.2.840.10008.1.1", b"1.2.840.10008.5.1.4.1.1.4"))
    )
    user = item(0x50, item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3"))
    body = struct.pack(">HH16s16s32x", 1, 0, b"RECALLSEG".ljust(16), b"HOSTILE".ljust(16))
    body += item(0x10, b"1.2.840.10008.3.1.1.1") + contexts + user
    return struct.pack(">BxI", 1, len(body)) + body


def hostile_bytes(chance: random.Random, request: bytes) -> bytes:
    kind = chance.randrange(8)
    if kind == 0:  # noise
        return chance.randbytes(chance.randrange(1, 4000))
    if kind == 1:  # a length that lies
        return struct.pack(">BxI", chance.randrange(1, 8), chance.choice((2**32 - 1, 2**31, 2**20)))
    if kind == 2:  # half a request
        return request[: chance.randrange(len(request))]
    if kind == 3:  # a damaged request
        damaged = bytearray(request)
        for _ in range(chance.randrange(1, 8)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        return bytes(damaged)
    if kind == 4:  # data before, or without, an association
        return struct.pack(">BxIIBB", 4, 6, 2, 1, 3)
    if kind == 5:  # an association, and then parts whose lengths lie
        part = struct.pack(">IBB", chance.choice((0, 1, 2**32 - 1, 7)), 3, chance.randrange(4))
        return request + struct.pack(">BxI", 4, len(part) + 20) + part + chance.randbytes(20)
    if kind == 6:  # commands without end
        part = struct.pack(">IBB", 16002, 3, 1) + chance.randbytes(16000)
        return request + (struct.pack(">BxI", 4, len(part)) + part) * 8
    command = chance.randbytes(chance.randrange(0, 200))  # a command of noise, said to be whole
    part = struct.pack(">IBB", len(command) + 2, 3, 3) + command
    return request + struct.pack(">BxI", 4, len(part)) + part


def latency(folder: Path, series: int) -> dict[str, Any]:
    quiet = 1.0
    with orthanc(folder / "pacs") as pacs:
        place = Place(folder, pacs.dicom_port, quiet_s=quiet)
        place.start()
        place.ready()
        beyond = []
        for number in range(series):
            files = write_series(folder / "out" / str(number), half_volume(24, seed=number))
            assert place.send(*files)
            begin = time.monotonic()
            while len(pacs.instances()) <= number:
                time.sleep(0.02)
            beyond.append(time.monotonic() - begin - quiet)
        text = urllib.request.urlopen(f"http://127.0.0.1:{place.metrics}/metrics").read().decode()
        total = next(
            float(line.split()[-1])
            for line in text.splitlines()
            if line.startswith("recallseg_stage_seconds_sum") and 'stage="segment"' in line
        )
        place.stop()
        own = [each - total / series for each in beyond]
        return {
            "series of 24 slices": series,
            "segmentation, mean s": round(total / series, 3),
            "beyond quiet time and segmentation, median and most s": [
                round(statistics.median(own), 3),
                round(max(own), 3),
            ],
            "broken": statistics.median(own) > 1.0,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("kills", "load", "hostile", "latency"))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--most-s", type=float, default=3.0, help="longest life of a node")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--objects", type=int, default=1000)
    parser.add_argument("--associations", type=int, default=50)
    parser.add_argument("--series", type=int, default=10)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="node-campaign-") as folder:
        try:
            found = {
                "kills": lambda: kills(Path(folder), asked.count, asked.most_s, asked.minutes),
                "load": lambda: load(Path(folder), asked.objects, asked.associations),
                "hostile": lambda: hostile(Path(folder), asked.count),
                "latency": lambda: latency(Path(folder), asked.series),
            }[asked.what]()
        except BaseException:
            log = Path(folder) / "node.log"
            print(log.read_text()[-5000:] if log.exists() else "no log", file=sys.stderr)
            raise
        print(json.dumps(found, indent=1))
    sys.exit(found["broken"])


if __name__ == "__main__":
    main()
