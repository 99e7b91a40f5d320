"""The rows of run directories: read, identified, and handed out as tables and frames."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmbench.errors import NMBenchError

if TYPE_CHECKING:
    import pandas


Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The rows of one or more run directories, newest record of each job, in the order of the table.

    `asked` holds the rows that the command at hand asked for, whether it made them or found them finished.
    """

    records: Sequence[Record]
    directories: Sequence[Path]
    asked: Sequence[Record] = ()

    def tidy(self) -> pandas.DataFrame:
        """One row per job and metric; `nmbench.frames.TIDY` says what the columns hold and in which units."""
        from nmbench.results.frames import tidy

        return tidy([{"directory": str(self.directories[0]), **record} for record in self.records])

    def frame(self) -> pandas.DataFrame:
        """One row per job; nested fields become dotted columns such as `seconds.prune` or `cost.forward_tokens`.

        `nmbench.frames.WIDE` says what the columns hold and in which units.
        """
        from nmbench.results.frames import wide

        return wide(self.records)

    def details(self) -> pandas.DataFrame:
        """One row per job, metric and item, where a metric tells details: the error of every layer, say."""
        from nmbench.results.frames import details

        return details(self.records)

    def protocol(self) -> list[str]:
        """One line for every run: model, patterns, metrics, calibration, seeds, device and versions."""
        from nmbench.results.protocol_line import protocol_lines

        return protocol_lines(self)

    def table(self) -> pandas.DataFrame:
        """One row per job, every figure as text: what the terminal shows."""
        from nmbench.results.table import rows

        return rows(self.records)

    def summary(self) -> pandas.DataFrame:
        """One row per label and pattern, as text: every metric with its standard deviation over seeds, and the cost."""
        from nmbench.results.table import summary

        return summary(self)


def load_results(*directories: str | os.PathLike[str]) -> Results:
    """Read run directories; of several, each record says which it is from in `directory`.

    Raises `NMBenchError` if one holds no records.
    """
    paths = [Path(directory) for directory in directories]
    records: list[Record] = []
    for path in paths:
        if not (path / "records.jsonl").is_file():
            raise NMBenchError(f"{path} is not a run directory: it has no records.jsonl.")
        where = {"directory": str(path)} if len(paths) > 1 else {}
        records += [{**record, **where} for record in newest(read_records(path / "records.jsonl"))]
    return Results(records, paths)


def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a row the same row."""
    return record["label"], record.get("pattern"), record.get("seed")


def start_label(record: Mapping[str, Any]) -> str:
    """The label of the row that a learner started from; records made before that was told have `<label>@init`."""
    return str(record.get("started_from") or f"{record['label']}@init")


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
            records.append(record)
        elif number < len(lines):
            raise NMBenchError(f"{path} line {number} is not a JSON object; remove it to go on without its row.")
    return records


def parsed(line: bytes) -> Record | None:
    """The record in a line, or None if it holds none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
