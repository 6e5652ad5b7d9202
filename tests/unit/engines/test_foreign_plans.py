"""Compiled plans that others could have written are not run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from recallseg.engines.errors import PlanError
from recallseg.engines.inside import others_may_write
from recallseg.engines.tensorrt.plans import Plan, PlanCache, PlanKey

KEY = PlanKey("embed", "0" * 64, "tensorrt", "10.3.0", "fp32", "sm87", {"n": [1, 1, 4]}, {})


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o002)  # where a group is shared, or each user's own: the default of many
    yield
    os.umask(before)


@pytest.fixture
def cache(tmp_path: Path, umask: None) -> PlanCache:
    cache = PlanCache(tmp_path / "plans")
    with cache.building(KEY):
        cache.store(KEY, b"plan", {})
    return cache


def found(cache: PlanCache) -> Plan:
    plan = cache.find(KEY)
    assert plan is not None
    return plan


def test_ones_own_plan_is_used_whatever_the_umask(cache: PlanCache) -> None:
    assert found(cache).read() == b"plan"
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    cache.folder.chmod(0o755)
    with pytest.raises(PlanError, match="others may write"):  # what is in it has the umask's modes
        cache.find(KEY)


@pytest.mark.parametrize("part", ["", "folder", "plan", "plan.json", "runtime-gpu"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_may_write_is_refused(cache: PlanCache, part: str, mode: int) -> None:
    plan = found(cache)
    (plan.folder / "runtime-gpu").write_bytes(b"kernels")
    cache.folder.chmod(0o755)
    for path in (plan.folder, *plan.folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert found(cache).read() == b"plan"
    changed = {"": cache.folder, "folder": plan.folder}.get(part, plan.folder / part)
    changed.chmod(changed.stat().st_mode | mode)
    for act in (lambda: cache.find(KEY), plan.read):
        with pytest.raises(PlanError, match=f"others may write {changed}: chmod go-w"):
            act()
    assert [entry.folder for entry in cache.entries()] == [plan.folder]  # to list and clear them
    cache.clear()
    assert not plan.folder.exists()


@pytest.mark.parametrize("part", ["", "plan", "plan.json"])
def test_what_is_anothers_is_refused(
    cache: PlanCache, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = found(cache)
    if os.geteuid() != 0:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    else:
        os.chown(plan.folder / part, 12345, -1)
    with pytest.raises(PlanError, match="belongs to user"):
        cache.find(KEY)
    with pytest.raises(PlanError, match="belongs to user"):
        plan.read()


def test_a_link_is_refused_and_nothing_is_nobodys(cache: PlanCache, tmp_path: Path) -> None:
    plan = found(cache)
    (plan.folder / "plan").rename(tmp_path / "elsewhere")
    (plan.folder / "plan").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PlanError, match="is a link"):
        cache.find(KEY)
    assert others_may_write(tmp_path / "nowhere") == ""
    assert others_may_write(cache.folder, "nothing/there") == ""
