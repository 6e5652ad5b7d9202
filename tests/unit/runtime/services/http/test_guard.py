"""Who may speak to the server, from where, how much and how long."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from nnInteractive.inference.remote.serialization import pack_array
from support.annotating import OTHER, TOKEN, Served, disc, http, serving

from recallseg.engines.errors import AuditError, InputError
from recallseg.runtime.services.http.limits import Limits
from recallseg.runtime.services.http.serving import Access

MINE = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    images = tmp_path_factory.mktemp("images")
    for seed in range(2):
        cv2.imwrite(str(images / f"case {seed}.png"), disc(seed=seed)[0])
    limits = Limits(sessions=8, body_bytes=200_000, image_bytes=300_000, body_s=1.0)
    with serving(
        tmp_path_factory.mktemp("guarded"),
        limits=limits,
        images=images,
        hosts=["scanner.example"],
        origins=["https://viewer.example"],
    ) as one:
        yield one


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": f"Basic {TOKEN}"}, 401),
        ({"Authorization": ""}, 401),
        ({"Host": "localhost:1527"}, 200),
        ({"Host": "scanner.example"}, 200),
        ({"Host": "attacker.example"}, 421),  # a name that was rebound to this machine
        ({"Host": "localhost.attacker.example"}, 421),
        ({"Host": "localhost@attacker.example"}, 421),
        ({"Host": "[::1"}, 421),
        ({"Host": ""}, 421),
        ({"Origin": "https://attacker.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://viewer.example"}, 200),
    ],
)
def test_host_origin_and_token(served: Served, headers: dict[str, str], status: int) -> None:
    given = MINE | headers
    assert http("get", f"{served.url}/api/server", headers=given).status_code == status


@pytest.mark.parametrize("name", ["Host", "Origin", "Authorization"])
def test_a_header_that_decides_is_given_once(served: Served, name: str) -> None:
    given = {"Host": "localhost", "Authorization": f"Bearer {TOKEN}", "Origin": served.url}
    lines = [f"{key}: {value}" for key, value in [*given.items(), (name, given[name])]]
    with socket.create_connection(("127.0.0.1", served.server.port)) as link:
        link.sendall("\r\n".join(["GET /api/server HTTP/1.1", *lines, "", ""]).encode())
        assert link.recv(65536).split()[1] == b"400"


def test_own_pages_may_and_those_of_another_port_may_not(served: Served) -> None:
    own = http("get", f"{served.url}/api/server", headers={**MINE, "Origin": served.url})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers
    other = {**MINE, "Origin": "http://127.0.0.1:1"}
    assert http("get", f"{served.url}/api/server", headers=other).status_code == 403


def test_without_a_token_there_is_the_page_and_nothing_else(served: Served) -> None:
    for path in ("/", "/app.js", "/healthz"):
        answer = http("get", served.url + path)
        assert answer.status_code == 200
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    for path in ("/api/server", "/capabilities", "/openapi.json", "/api/library", "/nothing"):
        assert http("get", served.url + path).status_code == 401
    assert (
        http("get", f"{served.url}/healthz", headers={"Authorization": "Bearer x"}).status_code
        == 401
    )


def test_a_preflight_is_answered_for_allowed_pages_only(served: Served) -> None:
    ask = {"Access-Control-Request-Method": "POST"}
    good = http(
        "options", f"{served.url}/claim", headers={**ask, "Origin": "https://viewer.example"}
    )
    assert good.headers["access-control-allow-origin"] == "https://viewer.example"
    bad = http("options", f"{served.url}/claim", headers={**ask, "Origin": "https://evil.example"})
    assert (bad.status_code, "access-control-allow-origin" in bad.headers) == (403, False)


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/page/../application.py",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/api/library/..%2f..%2fetc%2fpasswd/picture",
        "/api/drafts/../../../etc/passwd",
    ],
)
def test_no_path_leads_to_a_file(served: Served, path: str) -> None:
    with socket.create_connection(("127.0.0.1", served.server.port)) as link:
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        link.sendall(f"{head}Connection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: link.recv(65536), b""))
    assert answer.split()[1] in (b"404", b"405", b"410", b"400"), answer


def test_images_are_named_by_marks_only(served: Served) -> None:
    listed = http("get", f"{served.url}/api/worklist", headers=MINE).json()["images"]
    assert sorted(one["name"] for one in listed) == ["case 0.png", "case 1.png"]
    for mark in ("case 0.png", "../images/case 0.png", "/etc/passwd", ""):
        asked = http("post", f"{served.url}/api/drafts", headers=MINE, json={"mark": mark})
        assert asked.status_code == 404
    asked = http("post", f"{served.url}/api/drafts", headers=MINE, json={"mark": listed[0]["mark"]})
    draft = asked.json()["draft"]
    others = {"Authorization": f"Bearer {OTHER}"}
    assert http("get", f"{served.url}/api/drafts/{draft}", headers=others).status_code == 410
    assert http("get", f"{served.url}/api/drafts/{draft}", headers=MINE).status_code == 200
    http("delete", f"{served.url}/api/drafts/{draft}", headers=MINE)


def test_requests_that_are_too_large_or_never_end(served: Served) -> None:
    claimed = http("post", f"{served.url}/claim", headers=MINE).json()["lease_token"]
    headers = {**MINE, "X-Lease-Token": claimed}
    large = http("post", f"{served.url}/set_image", headers=headers, content=bytes(200_001))
    assert large.status_code == 413
    json_ = http("post", f"{served.url}/predict", headers=headers, content=b" " * (2 << 20))
    assert json_.status_code == 413

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(10_000)

    chunked = http("post", f"{served.url}/set_image", headers=headers, content=endless())
    assert chunked.status_code == 413
    bomb = pack_array(np.zeros((1, 100, 100, 100), np.uint8))
    assert len(bomb) < 1000
    refused = http("post", f"{served.url}/set_image", headers=headers, content=bomb)
    assert (refused.status_code, "takes 300000 at most" in refused.text) == (400, True)
    with socket.create_connection(("127.0.0.1", served.server.port)) as link:
        link.settimeout(300)
        head = f"POST /set_image HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        link.sendall(f"{head}X-Lease-Token: {claimed}\r\nContent-Length: 5000\r\n\r\nabc".encode())
        begin = time.monotonic()
        assert link.recv(65536).split()[1] == b"408"
        assert time.monotonic() - begin < 50  # a minute unless told otherwise
    http("post", f"{served.url}/release", headers=headers)
    assert served.desk.propose(disc()[0]) is not None


def test_who_is_refused_while_sending_is_told_why(served: Served) -> None:
    body = b" " * (2 << 20)
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    for token, status in (("no", b"401"), (TOKEN, b"413")):
        with socket.create_connection(("127.0.0.1", served.server.port)) as link:
            link.settimeout(300)
            link.sendall(f"{head}Authorization: Bearer {token}\r\n\r\n".encode())
            assert link.recv(12) == b"HTTP/1.1 " + status, "at once"
            link.sendall(body)  # as one does who looks at the answer when all is sent
            told = b"".join(iter(lambda: link.recv(65536), b""))
            assert b"detail" in told, "not cut off"
    with socket.create_connection(("127.0.0.1", served.server.port)) as link:
        link.settimeout(300)
        link.sendall(f"{head}Authorization: Bearer {TOKEN}\r\n\r\n".encode())
        begin = time.monotonic()
        assert b"detail" in b"".join(iter(lambda: link.recv(65536), b""))
        assert time.monotonic() - begin < 30, "who sends nothing more is not waited for"


def test_nothing_is_accepted_that_cannot_be_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise AuditError("the disk is full")

    image, _ = disc()
    with (
        serving(tmp_path) as served,
        httpx.Client(base_url=served.url, headers=MINE, timeout=300) as client,
    ):
        opened = client.post("/api/drafts/upload", content=pack_array(image[None, None]))
        draft = opened.json()["draft"]
        assert client.post(f"/api/drafts/{draft}/propose").json()["proposed"]
        with monkeypatch.context() as patch:
            patch.setattr(served.desk.audit, "note", full)
            refused = client.post(f"/api/drafts/{draft}/accept", json={"structures": ["disc"]})
        assert (refused.status_code, len(served.desk.library)) == (507, 4)
        accepted = client.post(f"/api/drafts/{draft}/accept", json={"structures": ["disc"]})
        assert (accepted.status_code, len(served.desk.library)) == (200, 5)
        again = client.post(f"/api/drafts/{draft}/accept", json={"structures": ["disc"]})
        assert again.status_code == 200
        assert len(served.desk.library) == 5, "a second accept takes the place of the first"
    events = [json.loads(line) for line in served.audit.read_text().splitlines()]
    assert [one["event"] for one in events] == ["accept", "accept"]
    assert events[0]["proposal"]["recalled"]["disc"]
    assert events[1]["instead_of"] == accepted.json()["exemplars"]
    assert not {"case", "png"} & set(served.audit.read_text().split())


def test_prometheus_finds_numbers_that_name_nobody(served: Served) -> None:
    http("get", f"{served.url}/api/drafts/secret-of-a-draft", headers=MINE)
    http("get", f"{served.url}/api/server")
    told = http("get", f"{served.url}/metrics", headers=MINE).text
    assert 'recallseg_refusals_total{reason="401",service="serve"}' in told
    assert 'stage="/api/drafts/{draft}"' in told
    assert "secret-of-a-draft" not in told
    assert http("get", f"{served.url}/metrics").status_code == 401


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"host": "0.0.0.0"}, "in the clear"),
        ({"token": "short"}, "16"),
        ({"users": ["a", "a"]}, "distinct"),
        ({"users": ["a", "b"], "token": "x" * 20}, "one user"),
        ({"key": Path("key.pem")}, "certificate"),
    ],
)
def test_access_that_is_not_safe_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Access.of(**given)  # type: ignore[arg-type]


def test_each_person_has_a_token_of_their_own() -> None:
    access = Access.of(["ada", "grace"])
    assert len({*access.tokens.values()}) == 2
    assert min(map(len, access.tokens.values())) >= 40
