"""The plan cache: what was built, for what, and whether it may be used.

::

    CACHE/plans/KEY/            KEY: digest over everything that decides which plan comes out
      plan                      the serialized plan
      plan.json                 the key's parts, the plan's SHA-256, how it was made
      state.json                what verification said, for each device that asked
      runtime-DEVICE            kernels that TensorRT-RTX compiled on a device
    CACHE/plans/.KEY.lock       held while one process builds; freed when it dies
    CACHE/plans/.KEY.PID        a plan on its way; never read, removed by the next builder of KEY

A plan's folder appears by one rename, so a plan that exists is whole. Equal keys mean equal plans:
another graph, TensorRT, target, precision or profile is another folder, and nothing that is stale
can be taken for something fresh (pitfall 11).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recallseg.engines.digest import digest_file, digest_json
from recallseg.engines.durable import replace_folder, write_file
from recallseg.engines.errors import PlanError
from recallseg.engines.paths import cache_folder
from recallseg.engines.reading import read_file
from recallseg.engines.verdicts import Verdicts, refuse_foreign, writing

__all__ = ["FORMAT_VERSION", "Plan", "PlanCache", "PlanKey"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PlanKey:
    """Everything that decides which plan comes out.

    Attributes
    ----------
    graph : its name.
    graph_digest : of the ``.onnx`` file and its weights.
    engine, version : which TensorRT, in full.
    precision, target, profile : see there; as text and JSON values.
    options : whatever else the builder was told.
    """

    graph: str
    graph_digest: str
    engine: str
    version: str
    precision: str
    target: str
    profile: Mapping[str, list[int]]
    options: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """The folder's name."""
        return digest_json({"format": FORMAT_VERSION, **asdict(self)})[:32]


@dataclass(frozen=True)
class Plan:
    """A plan in the cache; its bytes are checked when they are read."""

    folder: Path
    key: PlanKey
    sha256: str
    size: int
    made: Mapping[str, Any]

    def read(self) -> bytes:
        """Return the serialized plan.

        Raises
        ------
        PlanError
            If it is not the one that was stored, or others may write it.
        """
        refuse_foreign(self.folder.parent, self.folder.name)
        try:
            data = read_file(self.folder / "plan")
        except OSError as error:
            raise PlanError(f"plan {self.folder} cannot be read: {error}.") from error
        digest = hashlib.sha256(data).hexdigest()
        if digest != self.sha256:
            raise PlanError(
                f"plan {self.folder} was changed or damaged: SHA-256 {digest[:12]} of "
                f"{len(data)} bytes, stored were {self.sha256[:12]} of {self.size}. "
                "Build it again: recallseg build."
            )
        return data

    @property
    def verdicts(self) -> Verdicts:
        """What verification said of exactly these bytes."""
        return Verdicts(self.folder / "state.json", self.sha256)


class PlanCache:
    """Plans on disk.

    Parameters
    ----------
    folder : where; ``$RECALLSEG_CACHE/plans`` or the user's cache folder by default.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder() / "plans"

    def find(self, key: PlanKey) -> Plan | None:
        """Return the plan of exactly this key, checked; None if there is none or it is damaged.

        Raises
        ------
        PlanError
            If others may write it, or the disk does not give it.
        """
        refuse_foreign(self.folder, key.digest)
        plan = self._open(self.folder / key.digest)
        if plan is None or plan.key != key:
            return None
        with _given(plan.folder):
            return plan if digest_file(plan.folder / "plan") == plan.sha256 else None

    def entries(self) -> list[Plan]:
        """Return every plan that has a whole record, oldest first; bytes are not checked.

        Raises
        ------
        PlanError
            If the disk does not give a record: it must not be taken for one that is not there.
        """
        if not self.folder.is_dir():
            return []
        with _given(self.folder):
            places = [path for path in self.folder.iterdir() if path.name[0] != "."]
        found = map(self._open, places)
        return sorted(
            (plan for plan in found if plan is not None),
            key=lambda plan: (str(plan.made.get("time", "")), plan.folder.name),
        )

    def store(self, key: PlanKey, data: bytes, made: Mapping[str, Any]) -> Plan:
        """Keep a plan; call it within :meth:`building`. What was there under its key is replaced.

        Raises
        ------
        PlanError
            If the folder cannot be written; nothing is left of the attempt then.
        """
        final = self.folder / key.digest
        sha256 = hashlib.sha256(data).hexdigest()
        record = {
            "format": FORMAT_VERSION,
            "key": asdict(key),
            "sha256": sha256,
            "bytes": len(data),
            "made": dict(made),
        }
        with writing(final), replace_folder(final) as work:  # what is there, find() refused
            write_file(work / "plan", data)
            write_file(work / "plan.json", json.dumps(record, indent=1).encode())
        return Plan(final, key, sha256, len(data), made)

    @contextmanager
    def building(self, key: PlanKey) -> Iterator[None]:
        """Hold the right to build this plan; a second process waits until the first is done."""
        path = self.folder / f".{key.digest}.lock"
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = path.open("wb")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def clear(self, *, engine: str | None = None, stale_for: str | None = None) -> tuple[int, int]:
        """Remove plans; return how many, and how many bytes that freed.

        Parameters
        ----------
        engine : only those of this engine; None means all, and whatever else lies there.
        stale_for : only those that another version than this one of the engine made.
        """
        count = freed = 0
        if not self.folder.is_dir():
            return 0, 0
        known, keep = set[str](), set[str]()
        for path in self.folder.iterdir():
            with suppress(PlanError):  # what the disk does not give may go with all others
                plan = None if path.name[0] == "." else self._open(path)
                if plan is None:
                    continue
                known.add(path.name)
                if (engine is not None and plan.key.engine != engine) or (
                    stale_for is not None and plan.key.version == stale_for
                ):
                    keep.add(path.name)
        everything = engine is None and stale_for is None
        for path in self.folder.iterdir():
            if path.name in keep or path.suffix == ".lock":
                continue
            if path.name not in known and (not everything or self._is_building(path)):
                continue
            freed += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            count += path.name in known
            with writing(path):
                shutil.rmtree(path)
        return count, freed

    def _is_building(self, remains: Path) -> bool:
        """Whether a folder that is no plan belongs to a builder that lives."""
        key = remains.name.split(".")[1] if remains.name.startswith(".") else ""
        try:
            with (self.folder / f".{key}.lock").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def _open(self, folder: Path) -> Plan | None:
        try:
            with _given(folder):
                record = json.loads(read_file(folder / "plan.json"))
            plan = Plan(
                folder,
                PlanKey(**record["key"]),
                str(record["sha256"]),
                int(record["bytes"]),
                dict(record["made"]),
            )
            whole = (
                record["format"] == FORMAT_VERSION
                and plan.key.digest == folder.name
                and (folder / "plan").stat().st_size == plan.size
            )
        except (
            *(FileNotFoundError, NotADirectoryError),
            *(ValueError, KeyError, TypeError, RecursionError),  # damaged
        ):
            return None
        return plan if whole else None


@contextmanager
def _given(what: Path) -> Iterator[None]:
    """Turn what the disk does not give into a PlanError; what is not there stays as it is."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise PlanError(
            f"plan {what} cannot be read: {error.strerror or error}. See to the disk, or remove it "
            "('recallseg cache clear') and build it again."
        ) from error
