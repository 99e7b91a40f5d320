"""Reading the records of run directories; the newest record of a row counts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmbench.errors import NMBenchError
from nmbench.results.format import Record, record_in


@dataclass(frozen=True)
class Rows:
    """The rows of one or more run directories, newest record of each job, in the order of the table.

    `asked` holds the rows of the current command, which were made by this command or finished before.
    """

    records: Sequence[Record]
    directories: Sequence[Path]
    asked: Sequence[Record] = ()


def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return label, pattern and seed, which identify a row in its run directory."""
    return record["label"], record.get("pattern"), record.get("seed")


def newest(records: Sequence[Record]) -> list[Record]:
    """Return the last record of every row; rows are in the order of their first records."""
    rows: dict[tuple[Any, ...], Record] = {}
    for record in records:
        rows[identity(record)] = record
    return list(rows.values())


def read_records(path: Path) -> list[Record]:
    """Return the records of all whole lines of a file, without a last line that a kill tore.

    Raises `NMBenchError` for any other line that is not a JSON object.
    """
    records = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = parsed(line)
        if record is not None:
            records.append(record_in(record, f"{path} line {number}"))
        elif number < len(lines):
            raise NMBenchError(f"{path} line {number} is not a JSON object; remove it to go on without its row.")
    return records


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line, or None if the line is not one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
