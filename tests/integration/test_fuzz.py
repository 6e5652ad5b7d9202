"""A small part of the fuzzing (all of it: ``python -m fuzz``), and a test of its own."""

from __future__ import annotations

import pytest
from fuzz.campaign import Findings, run_campaign
from fuzz.mutations import FORMATS
from fuzz.tracing import judge

EACH = 120


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_read_or_refused(kind: str) -> None:
    found = Findings()
    run_campaign(kind, EACH, 1, found)
    assert not found.findings
    assert sum(found.counts[kind].values()) == EACH
    assert found.counts[kind]["refused"] > EACH // 5
    assert found.counts[kind]["read"] > 0


@pytest.mark.parametrize(
    ("kind", "each"), [("library", 25), ("bundle", 20), ("index", 8), ("release", 60)]
)
def test_received_artefacts_are_read_or_refused(kind: str, each: int) -> None:
    found = Findings()
    run_campaign(kind, each, 1, found)
    assert not found.findings
    assert sum(found.counts[kind].values()) == each
    assert found.counts[kind]["read"] > 0
    assert found.counts[kind]["refused"] > each // 3 or kind == "index"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('7 openat(3</tmp/recallseg-fuzz-abcd1234/received>, "x", O_RDONLY) = 5', "inside"),
        (
            '7 openat(AT_FDCWD</>, "/tmp/recallseg-fuzz-abcd1234/received/x", O_RDONLY) '
            "= 5</tmp/recallseg-fuzz-abcd1234/outside/secret>",
            "foreign-open",
        ),
        ('7 openat(AT_FDCWD</>, "/tmp/recallseg-fuzz-abcd1234/received/../outside/secret", '
         "O_RDONLY) = 5", "foreign-open"),
        ('7 openat(AT_FDCWD</>, "/home/x/.profile", O_RDWR|O_CREAT, 0644) = 5', "foreign-write"),
        ('7 unlink("/home/x/.profile") = 0', "foreign-write"),
        ('7 unlinkat(4</tmp/recallseg-fuzz-abcd1234/outside>, "secret", 0) = 0', "foreign-write"),
        ('7 rename("/tmp/recallseg-fuzz-abcd1234/received/a", "/home/x/a") = 0', "foreign-write"),
        ('7 openat(AT_FDCWD</>, "/usr/lib/x.so", O_RDONLY|O_CLOEXEC) = 5</usr/lib/x.so>', None),
        ('7 unlink("/home/x/.profile") = -1 ENOENT (No such file or directory)', None),
    ],
)  # fmt: skip
def test_tracing_sees_what_goes_outside(line: str, expected: str | None) -> None:
    seen = judge(line)
    assert (seen[0] if seen else None) == expected


@pytest.mark.parametrize(
    ("reader", "outcome"),
    [
        ("wrong_exception", "exception"),
        ("crash", "crash"),
        ("hang", "hang"),
        ("swallow", "memory"),
    ],
)
def test_a_broken_reader_is_found(reader: str, outcome: str) -> None:
    found = Findings()
    run_campaign("picture", 2, 1, found, reader=f"fuzz.broken_readers:{reader}", seconds=0.5)
    assert found.counts["picture"] == {outcome: 2}
    assert len(found.findings) == 2
