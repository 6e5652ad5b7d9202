"""What was measured, as a table of text."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from recallseg.runtime.reports.format import csv_text

__all__ = ["write_rows"]


def write_rows(path: Path, kind: type[Any], rows: Iterable[Any]) -> None:
    """Write a CSV file with a column for each field of ``kind``, a dataclass that all rows are."""
    columns = [field.name for field in fields(kind)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            values = [getattr(row, column) for column in columns]
            writer.writerow([csv_text(v) if isinstance(v, str) else v for v in values])
