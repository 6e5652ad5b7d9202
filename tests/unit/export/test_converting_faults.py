"""What ``convert`` says when the files of a bundle cannot be copied."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from recallseg.engines.errors import ExportError
from recallseg.export.converting import _copy


def test_a_bundle_that_cannot_be_copied_is_told_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()
    for name in ("one", "two"):
        (tmp_path / "source" / name).write_bytes(b"data")

    def full(*values: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ExportError, match=r"source/\w+ cannot be copied: .*No space.*1 more files"):
        _copy(tmp_path / "source", tmp_path / "target")
