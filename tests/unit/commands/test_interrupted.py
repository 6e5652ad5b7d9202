"""Who stops the command while it starts is answered as later."""

from __future__ import annotations

import subprocess
import sys

import pytest

STOPPED = """
import os, runpy, signal, sys

class Stops:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started with & ignores it
sys.meta_path.insert(0, Stops())
sys.argv = ["recallseg", "--help"]
runpy.run_module("recallseg", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["recallseg.cli", "recallseg.commands.watch"])
def test_a_command_that_is_stopped_while_it_is_imported(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOPPED.format(module=module)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")
