"""The plan cache: whole or absent, fresh or refused, whatever the process or the disk does."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recallseg.engines import durable
from recallseg.engines.errors import PlanError
from recallseg.engines.tensorrt import plans
from recallseg.engines.tensorrt.plans import PlanCache, PlanKey
from recallseg.engines.verdicts import Verdict

KEY = PlanKey(
    "attend",
    "ab" * 32,
    "tensorrt",
    "10.3.0",
    "fp16",
    "current on sm87 Orin",
    {"n": [1, 1, 4], "k": [1, 4, 16]},
    {"stripped": False, "workspace": None},
)
DATA = bytes(range(256)) * 64
MADE = {"time": "2026-01-01", "seconds": 1.0}


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "plans")


def keep(cache: PlanCache, key: PlanKey = KEY, data: bytes = DATA) -> plans.Plan:
    with cache.building(key):
        return cache.store(key, data, MADE)


def test_what_was_stored_is_found_by_its_key_only(cache: PlanCache) -> None:
    stored = keep(cache)
    assert cache.find(KEY) == stored
    assert stored.read() == DATA
    for other in (
        replace(KEY, graph_digest="cd" * 32),
        replace(KEY, version="10.3.1"),
        replace(KEY, target="current on sm89 RTX 4090"),
        replace(KEY, precision="bf16"),
        replace(KEY, profile={"n": [1, 1, 4], "k": [1, 4, 32]}),
        replace(KEY, engine="tensorrt-rtx"),
        replace(KEY, options={"stripped": True, "workspace": None}),
        replace(KEY, graph="embed"),
    ):
        assert cache.find(other) is None


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_one_changed_byte_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, at: int, flip: int
) -> None:
    cache = PlanCache(tmp_path_factory.mktemp("cache"))
    stored = keep(cache)
    damaged = bytearray(DATA)
    damaged[at] ^= flip
    (stored.folder / "plan").write_bytes(damaged)
    assert cache.find(KEY) is None
    with pytest.raises(PlanError, match="changed or damaged"):
        stored.read()
    assert keep(cache).read() == DATA  # and the cache is of use again


@pytest.mark.parametrize("size", [0, 1, len(DATA) // 2, len(DATA) - 1, len(DATA) + 1])
def test_a_truncated_plan_is_not_found(cache: PlanCache, size: int) -> None:
    stored = keep(cache)
    (stored.folder / "plan").write_bytes((DATA * 2)[:size])
    assert cache.find(KEY) is None
    with pytest.raises(PlanError):
        stored.read()


def test_a_foreign_or_newer_record_is_not_read(cache: PlanCache) -> None:
    stored = keep(cache)
    record = json.loads((stored.folder / "plan.json").read_text())
    for change in (
        {"format": plans.FORMAT_VERSION + 1},
        {"key": {**record["key"], "version": "11.0"}},
        {"key": {}},
        {"sha256": "0" * 64},
    ):
        (stored.folder / "plan.json").write_text(json.dumps({**record, **change}))
        assert cache.find(KEY) is None
    (stored.folder / "plan.json").write_text("[1")
    assert cache.find(KEY) is None
    assert cache.entries() == []
    # A folder copied under another key's name is no plan for that key.
    stored.folder.rename(cache.folder / replace(KEY, version="11.0").digest)
    assert cache.find(replace(KEY, version="11.0")) is None


def test_a_plan_that_the_disk_does_not_give_is_not_taken_for_none(
    cache: PlanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another engine is chosen, or it is called built and not verified, without a word."""
    stored = keep(cache)

    def fail(path: Path) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    for name in ("read_file", "digest_file"):
        with monkeypatch.context() as failing:
            failing.setattr(plans, name, fail)
            with pytest.raises(PlanError, match=f"{KEY.digest} cannot be read: Input/output"):
                cache.find(KEY)
    monkeypatch.setattr(plans, "read_file", fail)
    with pytest.raises(PlanError, match=r"cannot be read: Input/output"):
        cache.entries()
    assert cache.clear(engine="tensorrt-rtx") == (0, 0)
    assert stored.folder.exists(), "what cannot be read may be another engine's"
    assert cache.clear()[1] > 0
    assert not stored.folder.exists()


# The child touches files only, whatever threads other tests have left running.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def killing(at: int, kill: Callable[[], None]) -> tuple[list[str], Callable[..., Any]]:
    """Return a hook that ends the process before its ``at``-th call of the file system."""
    seen: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == at:
                kill()
            return real(*args, **kwargs)

        return step

    return seen, wrap


CALLS = ("mkdir", "open", "pwrite", "fsync", "rename", "replace", "rmdir", "unlink")


def with_hooks(monkeypatch: pytest.MonkeyPatch, at: int, kill: Callable[[], None]) -> list[str]:
    seen, wrap = killing(at, kill)
    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    return seen


@pytest.mark.parametrize("before", ["nothing", "damaged", "verdict"])
def test_a_writer_killed_at_any_moment_leaves_a_usable_cache(
    tmp_path: Path, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fork, and die before the first, second, ... call of the file system until none is left."""
    survived = False
    for at in range(1, 60):
        cache = PlanCache(tmp_path / f"{before}{at}")
        if before == "damaged":
            (keep(cache).folder / "plan").write_bytes(b"short")
        elif before == "verdict":
            keep(cache)
        child = os.fork()
        if child == 0:
            with_hooks(monkeypatch, at, lambda: os._exit(9))
            if before == "verdict":
                found = cache.find(KEY)
                assert found is not None
                found.verdicts.record(Verdict(True, "gpu", "g"))
            else:
                keep(cache)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        found = cache.find(KEY)
        assert found is None or found.read() == DATA  # in full or not at all
        if before == "verdict":
            assert found is not None
            assert found.verdicts.find("gpu", "g") in (None, Verdict(True, "gpu", "g", ()))
        assert keep(cache).read() == DATA  # the lock is free, remains are no hindrance
        names = {path.name for path in cache.folder.iterdir()}
        assert names == {KEY.digest, f".{KEY.digest}.lock"}
        if status == 0:
            survived = True
            break
    assert survived
    assert at > 5  # else nothing was hooked


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_disk_that_fails_at_any_moment_is_reported_and_leaves_nothing(
    tmp_path: Path, code: int
) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    for at in range(1, 60):
        cache = PlanCache(tmp_path / str(at))
        with pytest.MonkeyPatch.context() as patch:
            seen = with_hooks(patch, at, fail)
            try:
                keep(cache)
            except PlanError as error:
                assert "cannot write to the plan cache" in str(error)  # noqa: PT017
                assert ("disk or quota is full" in str(error)) == (code == errno.ENOSPC)  # noqa: PT017
            else:
                break
        assert at <= len(seen)
        assert not list(cache.folder.glob(f".{KEY.digest}.new-*"))
        assert keep(cache).read() == DATA
    assert at > 5


def test_a_second_builder_waits_for_the_first(cache: PlanCache) -> None:
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with cache.building(KEY):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
            cache.store(KEY, DATA, MADE)
        os._exit(0)
    os.read(ready[0], 1)
    os.write(done[1], b"x")
    with cache.building(KEY):
        assert cache.find(KEY) is not None  # built by the other, not a second time
    os.waitpid(child, 0)


def test_verdicts_belong_to_a_plan_a_device_and_golden_tensors(cache: PlanCache) -> None:
    plan = keep(cache)
    assert plan.verdicts.states == {}
    good = Verdict(True, "gpu a", "golden 1", (("logits", 1e-4, 1e-3),))
    bad = Verdict(False, "gpu b", "golden 1", (("logits", float("inf"), 1e-3),), "'logits' is off")
    plan.verdicts.record(good)
    plan.verdicts.record(bad)
    assert plan.verdicts.states == {"gpu a": "verified", "gpu b": "refused"}
    found = plan.verdicts.find("gpu b", "golden 1")
    assert found is not None
    assert not found.passed
    assert found.reason == "'logits' is off"
    assert plan.verdicts.find("gpu a", "golden 2") is None
    assert plan.verdicts.find("gpu c", "golden 1") is None
    # Other bytes under the same key were never verified.
    other = keep(cache, data=DATA + b"x")
    assert other.verdicts.find("gpu a", "golden 1") is None
    (plan.folder / "state.json").write_text("{")
    assert plan.verdicts.states == {}
    assert plan.verdicts.find("gpu a", "golden 1") is None
    # What cannot be read now is not replaced by less.
    plan.verdicts.record(bad)
    whole = (plan.folder / "state.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: os.open(path / "no folder", os.O_RDONLY))
        assert plan.verdicts.find("gpu b", "golden 1") is None
        with pytest.raises(PlanError, match=r"state\.json: Not a directory"):
            plan.verdicts.record(bad)
    assert (plan.folder / "state.json").read_bytes() == whole


def test_clear_takes_what_it_is_told(cache: PlanCache) -> None:
    keys = [
        KEY,
        replace(KEY, graph="embed"),
        replace(KEY, version="10.2.0"),
        replace(KEY, engine="tensorrt-rtx"),
    ]
    for key in keys:
        keep(cache, key)
    (cache.folder / "stray").mkdir()
    assert cache.clear(engine="tensorrt", stale_for="10.3.0")[0] == 1
    assert [cache.find(key) is not None for key in keys] == [True, True, False, True]
    count, freed = cache.clear(engine="tensorrt")
    assert (count, freed > 2 * len(DATA)) == (2, True)
    with cache.building(KEY):
        work = cache.folder / f".{KEY.digest}.new-00000001"
        work.mkdir()
        assert cache.clear()[0] == 1
        assert work.exists()  # somebody is building there
    cache.clear()
    assert {path.suffix for path in cache.folder.iterdir()} == {".lock"}
    assert PlanCache(cache.folder / "none").clear() == (0, 0)


def test_nothing_is_half_written_when_replacing_a_file_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    durable.replace_file(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        durable.replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
