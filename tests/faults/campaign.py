"""Lets every call of an operation fail, one at a time, and looks at what is left.

A process with everything imported is forked for each fault: the child copies the prepared folder,
does the operation with the fault, and judges. What must hold, whatever failed:

- the operation returns, or raises one of our errors, which names what it could not do;
- the folder reads and verifies, and is in the state before the operation or the one after it;
  after it, where the operation had returned;
- the operation can be done next, without the fault, and no file is left that is not there
  otherwise.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import re
import select
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from faults.operation import CommandError, Operation, names
from faults.record import Point, Record
from faults.shim import CALLS, FAULTS, Fault, counting, injecting
from recallseg.engines.errors import RecallSegError

__all__ = ["HUNG", "Judge", "Verdict", "in_child", "prepared", "run_operation"]

UNSEEN = ("rebuild", "rebuild_index", "read")
"""Operations that change nothing that a reader sees."""
HUNG = "did not end in time"
MAY_LEAVE = ("killed", "died")
"""Outcomes after which a file may be unfinished; whoever does the same again removes it."""
IDLE_S = 90
"""Without a moment of the processor, even on a busy machine: it waits for what does not come."""
_VARYING = re.compile(r"[0-9a-f]{6,}|\d+")


@dataclass
class Verdict:
    """What came of one case."""

    calls: dict[str, int] = field(default_factory=dict)
    fired: int = 0
    outcome: str = ""  # "done", or the kind of error
    said: str = ""
    violations: list[str] = field(default_factory=list)


def run_operation(
    operation: Operation,
    work: Path,
    record: Record,
    *,
    kinds: Sequence[str] = tuple(CALLS),
    every: int = 1,
    seed: int = 0,
    seconds: float = math.inf,
    progress: Callable[[str], None] = print,
) -> None:
    """Let every call fail once in each way, in an order that the seed gives.

    What the record has is passed over. ``kinds`` are those of calls; ``every`` takes one point in
    so many; after ``seconds`` what is left is left.
    """
    limit = operation.seconds
    judge, chance = prepared(operation, work), random.Random(f"{seed} {operation.name}")
    calls = in_child(judge.count, limit).calls
    faults = [fault for fault in FAULTS if fault.call in kinds]
    for fault in faults:
        record.counted(operation.name, str(fault), calls[fault.call])
    until = time.monotonic() + seconds  # to prepare and to count may take as long
    points = [(fault, n) for fault in faults for n in range(1, calls[fault.call] + 1)]
    for fault, number in chance.sample(points, -(-len(points) // every)):
        point = Point(operation.name, str(fault), number)
        if record.done(point):
            continue
        if time.monotonic() > until:
            return
        verdict = in_child(lambda n=number, fault=fault: judge.case(fault, n), limit)  # type: ignore[misc]
        found = [
            f"{operation.name} {fault} at {number} of {calls[fault.call]}: {violation}"
            for violation in verdict.violations
        ]
        record.note(point, verdict.fired > 0, verdict.outcome, found)
        for text in found:
            progress(text)


def prepared(operation: Operation, work: Path) -> Judge:
    """Prepare an operation below a folder and do it once, to know what it leads to."""
    base, clean = work / "base", work / "clean"
    base.mkdir(parents=True)
    operation.prepare(base)
    before = operation.state(base)
    shutil.copytree(base, clean)
    operation.run(clean)
    after, there = operation.state(clean), _kinds(names(clean))
    shutil.rmtree(clean)
    if (before == after) != operation.name.endswith(UNSEEN):
        raise AssertionError(f"what {operation.name} does is not seen in its state: {after}")
    gc.collect()
    gc.freeze()  # or each child looks through, and so copies, all that is there already
    return Judge(operation, base, work / "case", before, after, there)


@dataclass
class Judge:
    """An operation, what it starts from and leads to, and a folder in which it is done."""

    operation: Operation
    base: Path
    case_folder: Path
    before: Any
    after: Any
    there: Counter[str]

    def fresh(self) -> None:
        """Make the folder anew, as the operation finds it."""
        shutil.rmtree(self.case_folder, ignore_errors=True)
        shutil.copytree(self.base, self.case_folder)

    def attempt(self) -> Verdict:
        """Do the operation; return how it ended."""
        verdict = Verdict()
        try:
            self.operation.run(self.case_folder)
            verdict.outcome = "done"
        except RecallSegError as error:
            verdict.outcome, verdict.said = type(error).__name__, str(error)
        except CommandError as error:
            verdict.outcome, verdict.said = "exit", str(error)
        except BaseException as error:
            verdict.outcome, verdict.said = f"bare {type(error).__name__}", str(error)
            way = [
                f"{Path(frame.filename).name}:{frame.lineno}"
                for frame in traceback.extract_tb(error.__traceback__)[-6:]
            ]
            verdict.violations.append(f"raised {error!r} at {' '.join(way)}")
        return verdict

    def count(self) -> Verdict:
        """Do the operation and count its calls by kind; runs in a process of its own."""
        self.fresh()
        with counting(self.case_folder) as calls:
            verdict = self.attempt()
        verdict.calls = calls
        return verdict

    def case(self, fault: Fault, number: int) -> Verdict:
        """Do the operation with one fault; runs in a process of its own."""
        self.fresh()
        root = self.case_folder
        with injecting(root, fault, number) as injected:
            verdict = self.attempt()
        verdict.fired = injected.fired
        if "defect" in verdict.said or "Traceback" in verdict.said:
            verdict.violations.append(f"called a defect: {verdict.said}")
        if verdict.outcome == "InputError":
            verdict.violations.append(f"called a fault of the input: {verdict.said}")
        if verdict.outcome not in ("done",) and not _names_a_place(verdict.said, root):
            verdict.violations.append(f"names no file or folder: {verdict.said}")
        # What cannot be deleted, or looked at, stays until somebody does the same again.
        stays = fault.call == "stat" or (fault.call == "unlink" and fault.lasting)
        self._look(verdict, may_leave=stays)
        return verdict

    def look(self, outcome: str) -> Verdict:
        """Look at what an operation that ended so has left; runs in a process of its own."""
        verdict = Verdict(outcome=outcome)
        self._look(verdict, may_leave=outcome in MAY_LEAVE)
        return verdict

    def _look(self, verdict: Verdict, *, may_leave: bool) -> None:
        root = self.case_folder
        try:
            state = self.operation.state(root)
        except BaseException as error:
            verdict.violations.append(f"({verdict.outcome}) then unreadable: {error!r}")
            return
        unfinished = {name for name in names(root) if name.endswith(".tmp")}
        if not may_leave and (left := _kinds(unfinished) - self.there):
            verdict.violations.append(f"({verdict.outcome}) left unfinished: {dict(left)}")
        partial = self.operation.partial(state, self.after)
        if state not in (self.before, self.after) and not partial:
            verdict.violations.append(f"({verdict.outcome}) neither before nor after: {state}")
        elif verdict.outcome == "done" and state != self.after:
            verdict.violations.append("returned, but was not done")
        try:
            self.operation.run(root)
        except (RecallSegError, CommandError) as error:
            if state != self.after:
                verdict.violations.append(f"({verdict.outcome}) cannot be done again: {error}")
        except BaseException as error:
            verdict.violations.append(f"({verdict.outcome}) the next call raised {error!r}")
        with suppress(Exception):
            state = self.operation.state(root)
        if state != self.after:
            verdict.violations.append(f"done again, it is {state}")
        keeps = self.operation.keeps
        there = {name for name in names(root) if not keeps or not name.startswith(keeps)}
        if left := _kinds(there) - self.there:
            verdict.violations.append(f"({verdict.outcome}) left behind: {dict(left)}")


def _kinds(found: set[str]) -> Counter[str]:
    """Count names, without the numbers in them."""
    return Counter(_VARYING.sub("#", name) for name in found)


def _names_a_place(said: str, root: Path) -> bool:
    return str(root) in said.replace("\n", "") or "case" in said


def in_child(act: Callable[[], Verdict], seconds: int) -> Verdict:
    """Run in a forked process; one that dies or hangs is a violation."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            signal.alarm(seconds)
            for descriptor in (1, 2):  # what it says is not for the campaign's reader
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            with os.fdopen(writing, "w", encoding="utf-8") as answer:
                json.dump(asdict(act()), answer)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as answer:
        _until_it_hangs(child, answer)
        text = answer.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and text:
        return Verdict(**json.loads(text))
    how = HUNG if code in (-signal.SIGALRM, -signal.SIGXCPU) else f"ended with {code}"
    return Verdict(outcome="died", violations=[f"the process {how}"])


def _until_it_hangs(child: int, answer: IO[str]) -> None:
    """Wait until a child answers or ends; end one that does nothing for long."""
    before = -1
    while not select.select([answer], [], [], IDLE_S)[0]:
        times = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        used = int(times[11]) + int(times[12])
        if used == before:
            os.kill(child, signal.SIGXCPU)
            return
        before = used
