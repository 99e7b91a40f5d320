"""The rows of run directories: read, identified, the newest of each job."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmbench.errors import NMBenchError
from nmbench.results.format import Record, upgraded


@dataclass(frozen=True)
class Rows:
    """The rows of one or more run directories, newest record of each job, in the order of the table.

    `asked` holds the rows that the command at hand asked for, made by it or found finished.
    """

    records: Sequence[Record]
    directories: Sequence[Path]
    asked: Sequence[Record] = ()


def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a row the same row."""
    return record["label"], record.get("pattern"), record.get("seed")


def newest(records: Sequence[Record]) -> list[Record]:
    """The last record of every row, rows in the order of their first record."""
    rows: dict[tuple[Any, ...], Record] = {}
    for record in records:
        rows[identity(record)] = record
    return list(rows.values())


def read_records(path: Path) -> list[Record]:
    """All whole lines of a records file; a torn last line, the mark of a kill, is left out."""
    records = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = parsed(line)
        if record is not None:
            records.append(upgraded(record, f"{path} line {number}"))
        elif number < len(lines):
            raise NMBenchError(f"{path} line {number} is not a JSON object; remove it to go on without its row.")
    return records


def parsed(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line, or None."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
