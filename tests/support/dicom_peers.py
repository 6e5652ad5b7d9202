"""DICOM programs that we did not write, as peers of a node: dcmtk, Orthanc, dcmjs-dimse."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def program(name: str) -> str:
    """The path of a program of dcmtk; pynetdicom brings scripts of the same names."""
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        found = shutil.which(name, path=folder)
        if found and not Path(found).read_bytes().startswith(b"#!"):
            return found
    return name


DCMTK = pytest.mark.skipif(
    not os.path.isabs(program("storescu")), reason="dcmtk is not installed (apt install dcmtk)"
)
_ORTHANC = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
ORTHANC = pytest.mark.skipif(
    not Path(_ORTHANC).exists(), reason="Orthanc is not installed (apt install orthanc)"
)
_PLUGIN = next(Path("/usr").glob("share/orthanc/plugins/libOrthancDicomWeb.so"), None)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def dcmtk(name: str, port: int, *arguments: object, called: str = "RECALLSEG") -> str:
    """Run a client of dcmtk; return what it said, with its exit status first."""
    done = subprocess.run(
        [program(name), "-v", "-aec", called, "127.0.0.1", str(port), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


@contextmanager
def dcmjs(
    folder: Path, own_port: int, node_port: int, files: Iterable[Path]
) -> Iterator[Iterator[dict[str, Any]]]:
    """Run ``dimse_peer.js``; yields what it tells; it is ended after a minute."""
    node, npm = shutil.which("node"), shutil.which("npm")
    modules = os.environ.get("NODE_PATH") or (
        npm and subprocess.run([npm, "root", "-g"], capture_output=True, text=True).stdout.strip()
    )
    if not node or not modules or not Path(modules, "dcmjs-dimse").is_dir():
        pytest.skip("dcmjs-dimse is not installed (npm install -g dcmjs-dimse)")
    folder.mkdir(exist_ok=True)
    script = Path(__file__).with_name("dimse_peer.js")
    process = subprocess.Popen(
        [node, str(script), str(own_port), str(folder), str(node_port), *map(str, files)],
        env={**os.environ, "NODE_PATH": modules},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    bound = threading.Timer(60, process.kill)
    bound.start()
    try:
        yield (json.loads(line) for line in process.stdout)
    finally:
        bound.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


class Orthanc:
    """A running Orthanc."""

    def __init__(self, dicom_port: int, http_port: int) -> None:
        self.dicom_port, self.http_port = dicom_port, http_port

    def get(self, path: str) -> Any:
        """Ask its REST interface."""
        url = f"http://127.0.0.1:{self.http_port}{path}"
        with urllib.request.urlopen(url, timeout=300) as answer:
            return json.loads(answer.read() or b"null")

    def post(self, path: str, body: object) -> Any:
        """Tell its REST interface."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.http_port}{path}"
        request = urllib.request.Request(url, data, method="POST")
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read() or b"null")

    def instances(self, modality: str = "SEG") -> list[dict[str, Any]]:
        """The instances of a modality that it holds, with their tags."""
        found = self.post(
            "/tools/find",
            {"Level": "Instance", "Query": {"Modality": modality}, "Expand": True},
        )
        return list(found)


@contextmanager
def orthanc(folder: Path, node_port: int = 1, **options: Any) -> Iterator[Orthanc]:
    """Run Orthanc, which knows a node on ``node_port`` as modality ``node``."""
    folder.mkdir(parents=True, exist_ok=True)
    dicom_port = options.pop("dicom_port", None) or free_port()
    http_port = options.pop("http_port", None) or free_port()
    configuration = {
        "Name": "peer",
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "HttpPort": http_port,
        "DicomPort": dicom_port,
        "DicomAet": "ORTHANC",
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomModalities": {"node": ["RECALLSEG", "127.0.0.1", node_port]},
        "Plugins": [str(_PLUGIN)] if _PLUGIN else [],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        "StableAge": 1,
        **options,
    }
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [_ORTHANC, str(folder / "orthanc.json")], stdout=log, stderr=subprocess.STDOUT
        )
        peer = Orthanc(dicom_port, http_port)
        try:
            end = time.monotonic() + 300
            while True:
                try:
                    peer.get("/system")
                    break
                except OSError:
                    assert time.monotonic() < end, (folder / "log").read_text()
                    assert process.poll() is None, (folder / "log").read_text()
                    time.sleep(0.05)
            yield peer
        finally:
            process.terminate()
            try:
                process.wait(300)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
