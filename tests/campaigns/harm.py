"""Harm from outside of a call: kills, signals, too little memory, clocks, threads, forks.

    PYTHONPATH=tests python -m campaigns.harm kills --count 2000 --seed 1
    PYTHONPATH=tests python -m campaigns.harm signals --count 300
    PYTHONPATH=tests python -m campaigns.harm memory
    PYTHONPATH=tests python -m campaigns.harm clock
    PYTHONPATH=tests python -m campaigns.harm threads --seconds 60

The operations and what must hold of them are those of ``python -m faults``. Exit status 1 if a
promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.campaign import HUNG, Judge, Verdict, in_child, prepared
from faults.operation import Operation, chosen
from faults.operations import OPERATIONS
from faults.shim import Fault, build, by_signal, injecting, jumping_clock

QUICK = tuple(
    name
    for name in OPERATIONS
    if name not in ("node", "export", "convert", "build", "fit", "library.read")
)
"""Operations of which one takes well below a second; ``memory`` takes the others too."""
PATIENCE_S = 600
"""After which a process hangs: it may be at work beside much else."""
MB = 1 << 20
ROOM_MB = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
"""Address space beside what the process has when the operation begins."""


@dataclass
class Sum:
    """What was done how often, and what should not have been."""

    counts: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def note(self, name: str, how: str, verdict: Verdict) -> None:
        """Take in what came of one case."""
        self.counts["cases"] += 1
        self.operations[name] += 1
        for violation in verdict.violations:
            text = f"{name} {how}: {violation}"
            self.violations.append(text)
            print(text, flush=True)


def _judges(names: list[str], work: Path) -> Iterator[tuple[Operation, Judge]]:
    for name in names:
        yield OPERATIONS[name], prepared(OPERATIONS[name], work / name)


def kills(names: list[str], count: int, seed: int, work: Path, number: int) -> Sum:
    """Send a signal at random calls to the system, no call twice, and look at what is left.

    Between two calls nothing changes on the disk: calls are all the moments that there are.
    """
    total, fault = Sum(), by_signal(number)
    points = []
    for name in names:
        judge = prepared(OPERATIONS[name], work / name)
        calls = in_child(judge.count, PATIENCE_S).calls[fault.call]
        points += [(judge, call) for call in range(1, calls + 1)]
    total.counts["calls"] = len(points)
    for judge, call in random.Random(seed).sample(points, min(count, len(points))):
        verdict = in_child(lambda: _signalled(judge, fault, call), PATIENCE_S)  # noqa: B023
        hit = verdict.outcome != "done"
        total.counts["hit"] += hit
        hung = [text for text in verdict.violations if HUNG in text]
        # Who is asked to end may do so early, without an error.
        ended = "killed" if hit else "done" if number == signal.SIGKILL else "stopped"
        verdict = in_child(lambda: judge.look(ended), PATIENCE_S)  # noqa: B023
        verdict.violations += hung
        total.note(judge.operation.name, f"signal {number} at {call}", verdict)
        total.operations[f"{judge.operation.name}, hit"] += hit
        if total.counts["cases"] % 100 == 0:
            print(dict(total.counts), flush=True)
    return total


def _signalled(judge: Judge, fault: Fault, call: int) -> Verdict:
    judge.fresh()
    with injecting(judge.case_folder, fault, call):
        judge.operation.run(judge.case_folder)
    return Verdict(outcome="done")


def memory(names: list[str], work: Path) -> Sum:
    """Do every operation within address spaces from tight to loose."""
    total = Sum()
    for operation, judge in _judges(names, work):
        for room in ROOM_MB:
            verdict = in_child(lambda: _within(judge, room * MB), PATIENCE_S)  # noqa: B023
            died = verdict.outcome == "died"
            total.counts[verdict.outcome] += 1
            if died:  # it may, but not hang; what it leaves is looked at
                hung = [text for text in verdict.violations if HUNG in text]
                verdict = Verdict(outcome="died", violations=hung)
            looked = in_child(lambda: judge.look(verdict.outcome), PATIENCE_S)  # noqa: B023
            verdict.violations += looked.violations
            total.note(operation.name, f"with {room} MiB more", verdict)
        print(f"{operation.name}: {dict(total.counts)}", flush=True)
    return total


def _within(judge: Judge, room: int) -> Verdict:
    judge.fresh()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    verdict = judge.attempt()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    # Too little memory may be told as such by whoever notices it first.
    verdict.violations = []
    return verdict


def clock(names: list[str], work: Path) -> Sum:
    """Do every operation while the time of day jumps back and forth by up to ten years."""
    total = Sum()
    for operation, judge in _judges(names, work):
        for most in (2, 3600, 86400, 10 * 365 * 86400):
            verdict = in_child(lambda: _jumping(judge, most), PATIENCE_S)  # noqa: B023
            if verdict.outcome != "done":
                verdict.violations.append(f"{verdict.outcome}: {verdict.said}")
            looked = in_child(lambda: judge.look(verdict.outcome), PATIENCE_S)  # noqa: B023
            verdict.violations += looked.violations
            total.counts[verdict.outcome] += 1
            total.note(operation.name, f"clock within {most} s", verdict)
        print(f"{operation.name}: {dict(total.counts)}", flush=True)
    return total


def _jumping(judge: Judge, most: int) -> Verdict:
    judge.fresh()
    with jumping_clock(most):
        return judge.attempt()


# One library, many processes and threads


def threads(seconds: float, count: int, processes: int, seed: int, work: Path) -> Sum:
    """One process writes, others read with many threads, all of them fork."""
    total = Sum()
    from support.fake_library import create

    folder = work / "library"
    with create(folder) as library:
        for number in range(6):
            _add(library, number)
    until = time.monotonic() + seconds
    children = {}
    for place in range(processes):
        role = _write if place == 0 else _read
        log = work / f"{place}.json"
        child = os.fork()
        if child == 0:
            status = 1
            try:
                found = role(folder, until, count, seed + place)
                log.write_text(json.dumps([found.counts, found.violations]))
                status = 0
            except BaseException as error:
                log.write_text(json.dumps([{}, [f"{role.__name__} raised {error!r}"]]))
            finally:
                os._exit(status)
        children[child] = log
    for child, log in children.items():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        counts, violations = json.loads(log.read_text()) if log.exists() else ({}, [])
        total.counts.update(counts)
        total.violations += violations
        if code and not violations:
            total.violations.append(f"a process ended with {code}")
    from support.fake_library import HashEncoder

    from recallseg.runtime.library import Library

    with Library.open(folder, mode="write", encoder=HashEncoder()) as library:
        if not library.verify().ok:
            total.violations.append(f"verify found {library.verify().problems}")
    for text in total.violations:
        print(text, flush=True)
    return total


def _add(library: Any, number: int) -> None:
    from support.fake_library import draw

    image, mask = draw(number)
    library.add(image, {"nucleus": mask}, key=f"case {number}")


def _in_threads(count: int, until: float, act: Callable[[int, random.Random], str]) -> Sum:
    from concurrent.futures import ThreadPoolExecutor

    def work(place: int) -> Sum:
        mine, chance = Sum(), random.Random(place)
        while time.monotonic() < until:
            try:
                mine.counts[act(place, chance)] += 1
            except Exception as error:
                mine.violations.append(f"thread {place} raised {error!r}")
                break
        return mine

    total = Sum()
    with ThreadPoolExecutor(count) as pool:
        for one in pool.map(work, range(count)):
            total.counts.update(one.counts)
            total.violations += one.violations
    return total


def _write(folder: Path, until: float, count: int, seed: int) -> Sum:
    from support.fake_library import HashEncoder

    from recallseg.errors import InputError
    from recallseg.runtime.library import Library

    with Library.open(folder, mode="write", encoder=HashEncoder()) as library:

        def act(place: int, chance: random.Random) -> str:
            number = chance.randrange(6, 40)
            key = f"case {number}"
            what = chance.randrange(8)
            try:
                if what < 3:
                    _add(library, number)
                    return "added"
                if what < 5:
                    library.remove(key)
                    return "removed"
                if what == 5:
                    library.retag(key, {"n": str(chance.random())})
                    return "retagged"
                if what == 6:
                    library.retire(key)
                    library.reinstate(key)
                    return "retired and back"
                return _fork(lambda: _in_a_fork(library), "forked while writing")
            except InputError:  # another thread was quicker
                return "refused"

        return _in_threads(min(count, 8), until, act)


def _read(folder: Path, until: float, count: int, seed: int) -> Sum:
    from support.fake_library import HashEncoder, embedding

    from recallseg.errors import LibraryLockedError
    from recallseg.runtime.library import Library

    asked = embedding(0)
    with Library.open(folder, encoder=HashEncoder()) as library:

        def act(place: int, chance: random.Random) -> str:
            what = chance.randrange(60)
            if what == 0:
                with suppress(LibraryLockedError):
                    Library.open(folder, mode="write", encoder=HashEncoder()).close()
                    raise AssertionError("two write at once")
                return "kept out"
            if what == 1:
                return _fork(lambda: _in_a_fork(library), "forked while reading")
            if what == 2:
                with Library.open(folder, encoder=HashEncoder()) as mine:
                    return f"opened with {'some' if len(mine) else 'no'} exemplars"
            found = library.search(asked, "nucleus", k=4)
            if len(found) != 4:
                raise AssertionError(f"{len(found)} of 4 found")
            first = found[0].key
            if first != "case 0":
                raise AssertionError(f"{first} is nearest to case 0")
            return "searched"

        return _in_threads(count, until, act)


def _in_a_fork(library: Any) -> int:
    """What a process does that was forked among threads: its parent's library refuses it.

    It opens none of its own: a thread of the parent may have held SQLite's lock when it was forked.
    """
    from support.fake_library import embedding

    from recallseg.errors import ForkedError

    signal.alarm(60)  # rather than to hang
    for call in (
        lambda: library.search(embedding(0), "nucleus", k=1),
        lambda: library.remove("case 1"),
        lambda: len(library),
    ):
        try:
            call()
        except ForkedError:
            continue
        return 3
    library.close()
    return 0


def _fork(act: Callable[[], int], said: str) -> str:
    child = os.fork()
    if child == 0:
        status = 9
        try:
            status = act()
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise AssertionError(f"{said}, the child ended with {code}")
    return said


def _silent() -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def main() -> int:
    """Run; exit status 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m campaigns.harm", description=__doc__)
    parser.add_argument("what", choices=["kills", "signals", "memory", "clock", "threads"])
    parser.add_argument("--only", action="append", help="operations of this name, or that have it")
    parser.add_argument("--count", type=int, default=200, help="of kills or signals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0, help="of threads")
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--output", type=Path, help="a file for the counts, as JSON")
    asked = parser.parse_args()
    if "faults_shim" not in os.environ.get("LD_PRELOAD", ""):
        return _with_shim()
    # Kills are many: of operations that take long, only where they are named.
    every = asked.only or asked.what == "memory"
    names = chosen(asked.only, [*OPERATIONS] if every else QUICK)
    begin = time.monotonic()
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="recallseg-harm-", dir=place) as folder:
        work = Path(folder)
        if asked.what == "kills":
            found = kills(names, asked.count, asked.seed, work, signal.SIGKILL)
        elif asked.what == "signals":
            found = kills(names, asked.count // 2, asked.seed, work, signal.SIGTERM)
            for name in names:
                shutil.rmtree(work / name)
            more = kills(names, asked.count // 2, asked.seed + 1, work, signal.SIGINT)
            found.counts.update(more.counts)
            found.operations.update(more.operations)
            found.violations += more.violations
        elif asked.what == "memory":
            found = memory(names, work)
        elif asked.what == "clock":
            found = clock(names, work)
        else:
            found = threads(asked.seconds, asked.threads, asked.processes, asked.seed, work)
    report = {
        "what": asked.what,
        "seed": asked.seed,
        "seconds": round(time.monotonic() - begin, 1),
        "counts": found.counts,
        "operations": found.operations,
        "violations": found.violations,
    }
    if asked.output:
        asked.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"{dict(found.counts)} in {report['seconds']} s, {len(found.violations)} violations")
    return 1 if found.violations else 0


def _with_shim() -> int:
    with tempfile.TemporaryDirectory(prefix="recallseg-own-") as own:
        environment = {
            **os.environ,
            "LD_PRELOAD": str(build(Path(own))),
            "RECALLSEG_STATE": f"{own}/state",
            "RECALLSEG_CACHE": f"{own}/cache",
            "COLUMNS": "300",
        }
        command = [sys.executable, "-m", "campaigns.harm", *sys.argv[1:]]
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
