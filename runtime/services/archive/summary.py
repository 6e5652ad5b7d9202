"""What became of every input, as one table: parquet, or CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from recallseg.engines.durable import make_folder, replacing
from recallseg.engines.errors import InputError
from recallseg.runtime.json_text import printable
from recallseg.runtime.reports.format import csv_text
from recallseg.runtime.services.archive.journal import Journal
from recallseg.runtime.services.archive.sources import TABLES, import_pyarrow

__all__ = ["check_summary", "write_summary"]

_BATCH = 1024
_TEXT = ("input", "series", "format", "outcome", "reason", "mask", "record", "quality")
_MADE = ("recipe", "provenance")
_WORST = ("suspect", "uncalibrated", "ok")


def check_summary(path: Path) -> None:
    """See before the work whether a summary can be written there.

    Raises
    ------
    InputError
        If its name ends in neither ``.parquet`` nor ``.csv``.
    EngineUnavailableError
        If parquet is wanted and pyarrow is not installed.
    """
    if path.suffix.lower() not in TABLES:
        raise InputError(
            f"a summary is a table, {' or '.join(TABLES)}; got {printable(path.name)}."
        )
    if path.suffix.lower() == ".parquet":
        import_pyarrow("parquet")


def write_summary(path: Path, journal: Journal, structures: Sequence[str]) -> int:
    """Write the table, in the order of outputs, batch by batch; return how many rows.

    One row for each output, and for each input without one. Columns: ``input``, ``series``,
    ``format``; ``outcome`` (``done``, ``set aside``, ``refused``, ``passed over``) and ``reason``;
    ``mask`` and ``record`` (below the folder of outputs); ``quality`` (of a volume the worst of its
    slices), ``slices`` and ``suspect_slices``; ``recipe`` and ``provenance``; ``seconds`` of
    segmenting and ``finished`` (UTC); and for each structure ``NAME voxels`` (of pictures pixels),
    ``NAME ml`` and ``NAME mm2``, null where the spacing is not known.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    make_folder(path.parent)
    rows = _rows(journal, structures)
    if path.suffix.lower() == ".csv":
        return _write_csv(path, rows, structures)
    return _write_parquet(path, rows, structures)


def _columns(structures: Sequence[str]) -> dict[str, str]:
    """Return the columns and what they hold."""
    numbers = {"slices": "int64", "suspect_slices": "int64"}
    made = {**dict.fromkeys(_MADE, "string"), "seconds": "float64", "finished": "time"}
    sizes = {
        f"{name} {unit}": kind
        for name in structures
        for unit, kind in (("voxels", "int64"), ("ml", "float64"), ("mm2", "float64"))
    }
    return {**dict.fromkeys(_TEXT, "string"), **numbers, **made, **sizes}


def _rows(journal: Journal, structures: Sequence[str]) -> Iterator[dict[str, Any]]:
    for _, named, row, place in journal.outputs():
        flags = row["flags"]
        folder = Path(place).parent
        yield {
            **{name: row[name] for name in ("series", "format", *_MADE, "seconds")},
            "input": row.get("input") or named,
            "outcome": "done",
            "mask": None if row["mask"] is None else str(folder / row["mask"]),
            "record": f"{place}.json",
            "quality": next(flag for flag in _WORST if flags.get(flag)),
            "slices": sum(flags.values()),
            "suspect_slices": flags.get("suspect", 0),
            "finished": datetime.fromisoformat(row["finished"]),
            **{f"{name} voxels": row["sizes"].get(name) for name in structures},
            **{f"{name} ml": row["millilitres"].get(name) for name in structures},
            **{f"{name} mm2": row["square_mm"].get(name) for name in structures},
        }
    for outcome, found in (
        ("set aside", journal.aside()),
        ("refused", journal.passed(refused=True)),
        ("passed over", journal.passed(refused=False)),
    ):
        for named, reason in found:
            yield {"input": named, "outcome": outcome, "reason": reason}


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_csv(path: Path, rows: Iterator[dict[str, Any]], structures: Sequence[str]) -> int:
    columns = _columns(structures)
    count = 0
    with replacing(path) as descriptor, _stream(descriptor) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator="\r\n")
        writer.writerow(csv_text(name) for name in columns)
        for row in rows:
            writer.writerow(_cell(row.get(name)) for name in columns)
            count += 1
        text.flush()
        text.detach()
    return count


def _cell(value: Any) -> Any:
    return csv_text(printable(value)) if isinstance(value, str) else value


def _text(value: Any) -> Any:
    """Return a value as it can be stored: a file's name need not be text."""
    return printable(value) if isinstance(value, str) else value


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], structures: Sequence[str]) -> int:
    arrow, parquet = import_pyarrow(), import_pyarrow("parquet")
    kinds = {
        "string": arrow.string(),
        "int64": arrow.int64(),
        "float64": arrow.float64(),
        "time": arrow.timestamp("us", tz="UTC"),
    }
    schema = arrow.schema([(name, kinds[kind]) for name, kind in _columns(structures).items()])
    schema = schema.with_metadata({"recallseg.structures": json.dumps(list(structures))})
    count = 0
    with (
        replacing(path) as descriptor,
        _stream(descriptor) as raw,
        parquet.ParquetWriter(raw, schema, compression="zstd") as writer,
    ):
        for batch in _batches(rows):
            texts = [{name: _text(value) for name, value in row.items()} for row in batch]
            writer.write_batch(arrow.RecordBatch.from_pylist(texts, schema))
            count += len(batch)
    return count


def _stream(descriptor: int) -> io.BufferedWriter:
    return os.fdopen(os.dup(descriptor), "wb")  # buffered: it goes on where a write was short
