"""Results as users hold them: the rows of run directories, and the tables and frames made of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from nmbench.errors import NMBenchError
from nmbench.results import frames, table
from nmbench.results.doubt_lines import doubt_lines
from nmbench.results.format import Record
from nmbench.results.protocol_line import protocol_lines
from nmbench.results.records import Rows, newest, read_records

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Results(Rows):
    """The rows of one or more run directories as tables, frames and lines of text."""

    def tidy(self) -> pandas.DataFrame:
        """One row per job and metric; `nmbench.results.frames.TIDY` says what the columns hold and in which units."""
        return frames.tidy([{"directory": str(self.directories[0]), **record} for record in self.records])

    def frame(self) -> pandas.DataFrame:
        """One row per job; nested fields become dotted columns such as `seconds.prune` or `cost.forward_tokens`.

        `nmbench.results.frames.WIDE` says what the columns hold and in which units.
        """
        return frames.wide(self.records)

    def details(self) -> pandas.DataFrame:
        """One row per job, metric and item, where a metric has details, such as the error of every layer."""
        return frames.details(self.records)

    def protocol(self) -> list[str]:
        """One line for every run: model, patterns, metrics, calibration, seeds, device and versions."""
        return protocol_lines(self)

    def doubts(self) -> list[str]:
        """One line for each reason to distrust a figure, as the terminal shows it below the table."""
        return doubt_lines(self.records)

    def table(self) -> pandas.DataFrame:
        """One row per job, every figure as text: what the terminal shows."""
        return table.rows(self.records)

    def summary(self) -> pandas.DataFrame:
        """One row per label and pattern, as text: every metric with its standard deviation over seeds, and the cost."""
        return table.summary(self)


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
        records += [cast(Record, {**record, **where}) for record in newest(read_records(path / "records.jsonl"))]
    return Results(records, paths)
