"""Loads a server: clients that click, sessions that nobody closes, requests that lie.

``python tests/support/serve_load.py --help`` runs more than the slow tests do, and prints figures.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import numpy as np
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession
from nnInteractive.inference.remote.serialization import pack_array

from recallseg.runtime.services.http.limits import Limits
from support.annotating import TOKEN, Served, disc, serving

MINE = {"Authorization": f"Bearer {TOKEN}"}


def resident_mib() -> float:
    """Return this process's resident memory in MiB."""
    status = Path("/proc/self/status").read_text()
    line = next(one for one in status.splitlines() if one.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def clicking(served: Served, clients: int, clicks: int) -> dict[str, Any]:
    """Let clients of nnInteractive click at once; return milliseconds and errors."""
    times: list[list[float]] = [[] for _ in range(clients)]
    errors: list[str] = []
    ready = threading.Barrier(clients)

    def work(number: int) -> None:
        try:
            with nnInteractiveRemoteInferenceSession(served.url, api_key=TOKEN) as session:
                image, _ = disc(45 + 4 * number, 60 + 3 * number, 20, number)
                session.set_image(image[None, None])
                session.set_target_buffer(np.zeros((1, *image.shape), np.uint8))
                session._predict()
                rng = random.Random(number)
                ready.wait(timeout=120)
                for _ in range(clicks):
                    point = [0, rng.randrange(120), rng.randrange(140)]
                    begin = time.perf_counter()
                    session.add_point_interaction(point, rng.random() < 0.5)
                    times[number].append((time.perf_counter() - begin) * 1e3)
        except Exception as error:  # whatever it is, the test tells it
            errors.append(repr(error))
            ready.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = np.concatenate([np.array(each) for each in times if each] or [np.zeros(1)])
    medians = [float(np.median(each)) for each in times if each]
    return {
        "clients": clients,
        "clicks": len(every),
        "errors": errors,
        "p50_ms": float(np.percentile(every, 50)),
        "p95_ms": float(np.percentile(every, 95)),
        "p99_ms": float(np.percentile(every, 99)),
        "slowest_by_fastest_client": max(medians, default=0) / max(min(medians, default=1), 1e-9),
    }


def abandoning(served: Served, sessions: int) -> list[float]:
    """Open sessions, propose, and leave; return the MiB held after each tenth of them."""
    image, _ = disc()
    body = pack_array(image[None, None])
    memory = []
    with httpx.Client(base_url=served.url, headers=MINE, timeout=60) as client:
        for number in range(sessions):
            while (claimed := client.post("/claim")).status_code == 503:
                time.sleep(0.05)
            lease = {"X-Lease-Token": claimed.json()["lease_token"]}
            assert client.post("/set_image", headers=lease, content=body).status_code == 200
            assert client.post("/predict", headers=lease, json={}).status_code == 200
            if (number + 1) % max(1, sessions // 10) == 0:
                memory.append(resident_mib())
    return memory


def raw(served: Served, path: str, headers: dict[str, str], body: bytes) -> int:
    """Send a request as it is, and no more; return the status, or 0 where it was cut off."""
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=90) as link:
        try:
            link.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
            link.shutdown(socket.SHUT_WR)
            answer = link.recv(65536)
        except OSError:
            return 0
    return int(answer.split()[1]) if answer else 0


def lying(served: Served, requests: int, seed: int = 0) -> dict[str, Any]:
    """Send requests that lie, in any order; another client clicks meanwhile and is served."""
    rng = random.Random(seed)
    image, _ = disc()
    good = [
        pack_array(image[None, None]),
        pack_array(image[None, None].astype(np.float32)),
        pack_array((image[None] > 100).astype(np.uint8)),
    ]
    bombs = [
        pack_array(np.zeros((1, 500, 500, 500), np.uint8)),
        struct.pack("<4sBBBB", b"NNIA", 1, 1, 255, 5),
    ]
    statuses: Counter[int] = Counter()
    stop, others, failures = threading.Event(), [0], []

    def click() -> None:
        try:
            with nnInteractiveRemoteInferenceSession(served.url, api_key=TOKEN) as session:
                session.set_image(image[None, None])
                session.set_target_buffer(np.zeros((1, *image.shape), np.uint8))
                while not stop.is_set():
                    session.reset_interactions()
                    assert session._predict() is not None
                    others[0] += 1
                    stop.wait(0.2)
        except Exception as error:
            failures.append(repr(error))

    def numbers() -> Any:
        pool = [0, 1, -1, 5, 1e9, -1e9, 1e400, 2**70, 0.5, None, "a", [], {}, True, [[[]]]]
        return rng.choice(pool)

    def body(path: str) -> bytes:
        kind = rng.random()
        if path in (
            "/set_image",
            "/add_scribble_interaction",
            "/add_lasso_interaction",
            "/add_initial_seg_interaction",
        ):
            if kind < 0.1:
                return rng.choice(bombs)
            data = bytearray(rng.choice(good))
            for _ in range(rng.choice([0, 1, 2, 20])):
                data[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(data[: rng.randrange(len(data)) if kind < 0.3 else len(data)])
        if kind < 0.1:
            return b"[" * rng.choice([1, 100, 100_000])
        if kind < 0.2:
            return rng.randbytes(rng.randrange(100))
        several = [numbers() for _ in range(rng.choice([2, 3, 3, 3, 4]))]
        value = {
            "coordinates": several,
            "bbox_coords": [[numbers(), numbers()] for _ in range(rng.choice([2, 3, 3]))],
            "include_interaction": rng.choice([True, False, None, 3]),
            "run_prediction": rng.choice([True, False]),
            "shape": several,
            "dtype": rng.choice(["uint8", "object", "O", "a" * 1000, None]),
            "structure": rng.choice(["disc", "", "\0", "x" * 5000, "../..", None, 3]),
            "do_autozoom": numbers(),
            "mark": rng.choice(["../../etc/passwd", "", 4, None]),
        }
        for name in rng.sample(sorted(value), rng.randrange(4)):
            del value[name]
        return json.dumps(value).encode()

    paths = [
        *("/set_image", "/set_target_buffer", "/predict", "/undo", "/reset_interactions"),
        *("/add_point_interaction", "/add_bbox_interaction", "/add_scribble_interaction"),
        *("/add_lasso_interaction", "/add_initial_seg_interaction", "/set_do_autozoom"),
        *(
            "/heartbeat",
            "/recallseg/target",
            "/recallseg/accept",
            "/api/drafts",
            "/api/drafts/x/undo",
        ),
        *("/api/drafts/upload", "/release", "/claim", "/nothing"),
    ]
    metas = [
        "",
        "{",
        "{}",
        "[]",
        '{"include_interaction": true, "interaction_bbox": [[0,1],[0,5],[0,99999]]}',
        '{"include_interaction": true}',
        '{"image_properties": {"spacing": [0, -1, 1e400]}}',
        "\\",
        "9" * 4000,
    ]
    other = threading.Thread(target=click)
    other.start()
    lease = ""
    with httpx.Client(base_url=served.url, timeout=60) as client:
        for number in range(requests):
            if number % 200 == 0:
                client.post("/release", headers={**MINE, "X-Lease-Token": lease})
                lease = client.post("/claim", headers=MINE).json()["lease_token"]
                client.post("/set_image", headers={**MINE, "X-Lease-Token": lease}, content=good[0])
            path = rng.choice(paths)
            if path == "/claim" and rng.random() < 0.9:
                continue
            headers = {
                **MINE,
                "X-Lease-Token": lease if rng.random() < 0.85 and path != "/release" else "dead",
                "X-Meta": rng.choice(metas),
                "Content-Type": rng.choice(["application/json"] * 9 + ["text/plain"]),
            }
            if rng.random() < 0.06:  # what no honest client sends
                lies = {
                    "Content-Length": rng.choice(["-1", "9" * 25, "x", "0", "5", "400000"]),
                    "Host": rng.choice(["localhost", "evil.example", "", "a b", "["]),
                }
                statuses[raw(served, path, headers | lies, body(path))] += 1
                continue
            try:
                statuses[client.post(path, headers=headers, content=body(path)).status_code] += 1
            except httpx.HTTPError:  # it was cut off, which it may be
                statuses[0] += 1
    stop.set()
    other.join()
    return {
        "requests": requests,
        "statuses": dict(sorted(statuses.items())),
        "others_served": others[0],
        "others_failed": failures,
        "alive": served.server.alive(),
    }


def main() -> None:
    """Run all, and print figures as JSON lines."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--bundle", default="demo")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--clicks", type=int, default=100)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=20_000)
    given = parser.parse_args()
    limits = Limits(image_bytes=1 << 26)
    dying = Limits(image_bytes=1 << 26, liveness_s=2.0)
    with tempfile.TemporaryDirectory() as folder:
        if given.clicks:
            with serving(Path(folder, "a"), bundle=given.bundle, threads=None) as served:
                print(json.dumps(clicking(served, given.clients, given.clicks)), flush=True)
        if given.sessions:
            with serving(Path(folder, "b"), bundle=given.bundle, limits=dying) as served:
                held = abandoning(served, given.sessions)
                print(json.dumps({"abandoned": given.sessions, "mib": held}), flush=True)
        if given.requests:
            with serving(Path(folder, "c"), bundle=given.bundle, limits=limits) as served:
                before = resident_mib()
                told = lying(served, given.requests)
                print(json.dumps({**told, "mib": [before, resident_mib()]}), flush=True)


if __name__ == "__main__":
    main()
