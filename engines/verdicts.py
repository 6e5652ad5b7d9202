"""What verification said of something compiled, kept beside it, for each device that asked."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recallseg.engines.durable import replace_file
from recallseg.engines.errors import PlanError
from recallseg.engines.inside import others_may_write
from recallseg.engines.reading import read_file

__all__ = ["Verdict", "Verdicts", "refuse_foreign", "writing"]


@dataclass(frozen=True)
class Verdict:
    """The outcome on one device.

    Attributes
    ----------
    passed : whether it may be used there.
    device : where, driver included: another driver compiles other kernels.
    golden : digest of the golden tensors that it was compared with.
    checks : tensor, error and tolerance of each comparison.
    reason : why it was refused; empty otherwise.
    """

    passed: bool
    device: str
    golden: str
    checks: tuple[tuple[str, float, float], ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Verdicts:
    """The file with verdicts on one subject.

    Attributes
    ----------
    path : the file; it need not exist.
    subject : digest of what was verified. Verdicts on another subject do not count.
    """

    path: Path
    subject: str

    def find(self, device: str, golden: str) -> Verdict | None:
        """Return what was said on ``device`` against these golden tensors; None if nothing was.

        A record that cannot be read counts as none: the subject is then verified again.
        """
        try:
            record = self._read()[device]
            checks = tuple((str(n), float(e), float(t)) for n, e, t in record["checks"])
            found = Verdict(**{**record, "checks": checks})
        except (KeyError, OSError, TypeError, ValueError):
            return None
        return found if found.golden == golden and found.device == device else None

    def record(self, verdict: Verdict) -> None:
        """Store a verdict; PlanError if it cannot be written, or those before cannot be read."""
        # JSON has no infinity: an error that is not finite is stored as the largest float.
        checks = [[name, min(error, 1e308), limit] for name, error, limit in verdict.checks]
        with writing(self.path):
            state = {
                "subject": self.subject,
                "verdicts": {**self._read(), verdict.device: {**asdict(verdict), "checks": checks}},
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, json.dumps(state, indent=1, allow_nan=False).encode())

    @property
    def states(self) -> dict[str, str]:
        """``verified`` or ``refused`` by device; empty for what was only built."""
        try:
            return {
                device: "verified" if record["passed"] else "refused"
                for device, record in self._read().items()
            }
        except (KeyError, OSError, TypeError):
            return {}

    def _read(self) -> dict[str, Any]:
        """Return what was said; nothing if it is damaged, which verifying again mends.

        OSError if there is something that cannot be read: it may not be replaced by less.
        """
        try:
            data = read_file(self.path)
        except FileNotFoundError:
            return {}
        try:
            state = json.loads(data)
            return dict(state["verdicts"]) if state["subject"] == self.subject else {}
        except (ValueError, KeyError, TypeError, RecursionError):
            return {}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` while writing to the cache into a PlanError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "The disk or quota is full: free some space, or 'recallseg cache clear'"
        else:
            hint = "Set RECALLSEG_CACHE to a folder that can be written"
        raise PlanError(
            f"cannot write to the plan cache: {path}: {error.strerror or error}. {hint}; "
            "plans that were there before are unharmed."
        ) from error


def refuse_foreign(root: Path, name: str) -> None:
    """Raise PlanError if others could have written what was compiled: it would run as this user."""
    try:
        told = others_may_write(root, name)
    except OSError as error:
        raise PlanError(f"plan {root / name} cannot be read: {error}.") from error
    if told:
        raise PlanError(
            f"a compiled plan is a program, and this one may be somebody else's: {told}. "
            "Or set RECALLSEG_CACHE to a folder of your own and build it again: recallseg build."
        )
