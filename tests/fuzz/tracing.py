r"""Reads what strace saw of a campaign, and says what went outside of its folder.

::

    strace -f --seccomp-bpf -qq -y -o '|python -m fuzz.tracing DIR' -e trace=TRACED \
        python -m fuzz --output DIR

Only what is between two marks counts. Written, made, renamed or removed may only be what is in a
folder of the campaign; somebody else's (``outside``) may not even be opened.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

__all__ = ["TRACED", "judge"]

TRACED = (
    "open,openat,openat2,creat,unlink,unlinkat,rename,renameat,renameat2,mkdir,mkdirat,rmdir,"
    "link,linkat,symlink,symlinkat,truncate,chmod,fchmodat,chown,fchownat,mknod,mknodat"
)
_CALL = re.compile(r"^\d+\s+(\w+)\((.*)\)\s+= (-?\d+)(?:<([^>]*)>)?")
_PATH = re.compile(r'(?:(AT_FDCWD|\d+)(?:<([^>]*)>)?, )?"((?:[^"\\]|\\.)*)"')
_WRITING = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND")
_CAMPAIGN = re.compile(r"^/[^\0]*recallseg-fuzz-[a-z0-9_]{8}(/|$)")
_ELSEWHERE = re.compile(r"^(/dev/(null|shm|tty)|/proc/self|/tmp/pymp-)|__pycache__")


def judge(line: str) -> tuple[str, str] | None:
    """Return what a line shows (``inside``, ``foreign-write``, ``foreign-open``) and the path."""
    call = _CALL.match(line)
    if call is None or int(call[3]) < 0:
        return None
    name, arguments = call[1], call[2]
    changes = not name.startswith("open") or bool(_WRITING.search(arguments.rpartition('"')[2]))
    worst: tuple[str, str] | None = None
    # What was opened in the end comes first: a link may have led there.
    for _, base, text in [("", "", call[4] or ""), *_PATH.findall(arguments)]:
        path = text if text.startswith("/") else f"{base}/{text}" if base else ""
        path = os.path.normpath(path)
        if "/outside" in path and _CAMPAIGN.match(path):
            return "foreign-write" if changes else "foreign-open", f"{name} {path}"
        if _CAMPAIGN.match(path):
            worst = worst or ("inside", path)
        elif changes and path.startswith("/") and not _ELSEWHERE.search(path):
            worst = ("foreign-write", f"{name} {path}")
    return worst


def main() -> None:
    """Count, and write ``trace.json`` into the folder given."""
    counts: Counter[str] = Counter()
    found: list[str] = []
    inside = False
    for line in sys.stdin:
        if "/recallseg-fuzz:" in line:
            inside = "/recallseg-fuzz:begin" in line
            counts["received"] += inside
            continue
        seen = judge(line) if inside else None
        counts["calls"] += inside
        if seen is not None:
            counts[seen[0]] += 1
            if seen[0] != "inside" and len(found) < 200:
                found.append(seen[1])
    report = {"counts": counts, "found": found}
    Path(sys.argv[1], "trace.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
