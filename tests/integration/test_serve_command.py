"""``recallseg serve`` as a process: what it prints, HTTPS, and that it ends when told to."""

from __future__ import annotations

import re
import signal
import ssl
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.annotating import fill

from recallseg.runtime.library import Library


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "server.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "recallseg", "serve", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(pattern, line):
            return found
    raise AssertionError("".join(said))


def test_over_https_with_the_token_that_it_prints(tmp_path: Path, certificate: Path) -> None:
    with Library.create(tmp_path / "lib", "demo", threads=1) as library:
        fill(library, 1)
    options = ["--port", "0", "--certificate", str(certificate), "--user", "ada", "--threads", "1"]
    with start(str(tmp_path / "lib"), *options) as process:
        try:
            url, token = read_until(process, r"ada: open (https://[\d.:]+)/#token=(\S+)").groups()
            with httpx.Client(
                base_url=url, verify=ssl.create_default_context(cafile=certificate), timeout=300
            ) as client:
                assert client.get("/api/server").status_code == 401
                told = client.get("/api/server", headers={"Authorization": f"Bearer {token}"})
                assert told.json()["user"] == "ada"
                assert told.json()["structures"] == ["disc"]
                opened = client.get("/openapi.json", headers={"Authorization": f"Bearer {token}"})
                paths = opened.json()["paths"]
                assert {"/api/drafts/{draft}/accept", "/predict", "/api/next"} <= paths.keys()
            second = subprocess.run(
                [sys.executable, "-m", "recallseg", "serve", str(tmp_path / "lib"), "--port", "0"],
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert second.returncode == 1
            assert "recallseg:" in second.stderr
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 0
    assert (tmp_path / "lib.audit.jsonl").exists()


def test_a_network_without_https_is_refused(tmp_path: Path) -> None:
    Library.create(tmp_path / "lib", "demo").close()
    with start(str(tmp_path / "lib"), "--host", "0.0.0.0", "--port", "0") as process:
        read_until(process, "in the clear")
        assert process.wait(timeout=300) == 1
