"""Results for users: the rows of run directories, and the tables and frames made of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, cast

from nmbench.errors import NMBenchError
from nmbench.results import frames, table
from nmbench.results.address import address_or_directory
from nmbench.results.directory import RunDirectory
from nmbench.results.doubt_lines import doubt_lines
from nmbench.results.format import Record
from nmbench.results.joining import joined
from nmbench.results.labels import Meaning, meanings
from nmbench.results.notes import failures, row_notes
from nmbench.results.protocol_line import protocol_lines
from nmbench.results.ranking import comparisons, of_run
from nmbench.results.records import Rows
from nmbench.results.sampled_note import sampled_notes

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Results(Rows):
    """The rows of one or more run directories as tables, frames and lines of text."""

    def __repr__(self) -> str:
        patterns = ", ".join(dict.fromkeys(str(record["pattern"]) for record in self.records if record["pattern"]))
        models = ", ".join(dict.fromkeys(record["model"] for record in self.records))
        failed = sum(record["status"] != "ok" for record in self.records)
        where = ", ".join(map(str, self.directories))
        state = f", {failed} failed" if failed else ""
        return f"<Results: {len(self.records)} rows of {models} at {patterns or 'no pattern'}{state}; {where}>"

    def _repr_html_(self) -> str:
        """Return the protocols and the table for a notebook."""
        lines = "".join(f"<p>{escape(line)}</p>" for line in self.protocol())
        return lines + table.rows(table.in_order(self.records)).to_html(index=False)

    def only(self, patterns: Sequence[str] = (), labels: Sequence[str] = (), seeds: Sequence[int] = ()) -> Results:
        """The dense rows, and the rows of these patterns, labels and seeds; an empty choice takes all.

        Raises `NMBenchError` if no row but the dense ones is left.
        """
        chosen = [
            record
            for record in self.records
            if record["pattern"] is None
            or (
                (not patterns or record["pattern"] in patterns)
                and (not labels or record["label"] in labels)
                and (not seeds or record["seed"] in seeds)
            )
        ]
        if all(record["pattern"] is None for record in chosen) and (patterns or labels or seeds):
            known = "; ".join(
                dict.fromkeys(f"{r['label']} {r['pattern']} seed {r['seed']}" for r in self.records if r["pattern"])
            )
            raise NMBenchError(f"no row is of that pattern, label and seed; there are {known or 'none'}.")
        return dataclasses.replace(self, records=chosen)

    def tidy(self) -> pandas.DataFrame:
        """Return one row per job and metric; `nmbench.results.frames.TIDY` describes the columns and their units."""
        return frames.tidy([{"directory": str(self.directories[0]), **record} for record in self.records])

    def frame(self) -> pandas.DataFrame:
        """Return one row per job; nested fields become dotted columns such as `seconds.prune` or `cost.forward_tokens`.

        `nmbench.results.frames.WIDE` describes the columns and their units.
        """
        return frames.wide(self.records)

    def details(self) -> pandas.DataFrame:
        """Return one row per job, metric and item, for metrics with details, such as the error of every layer."""
        return frames.details(self.records)

    def protocol(self) -> list[str]:
        """Return one line for every run: model, patterns, metrics, calibration, seeds, device and versions."""
        return protocol_lines(self)

    def doubts(self) -> list[str]:
        """One line for each reason to distrust a figure, as the terminal shows it below the table."""
        return doubt_lines(self.records)

    def rankings(self) -> list[str]:
        """Return the order of rows on every text, best first, and which of them can be told apart."""
        return [line.strip() for line in comparisons(self)]

    def notes(self) -> list[str]:
        """Return what is not, or hardly, what a row asks for, and a line for every row that failed."""
        found = (sampled_notes(self.records), row_notes(self.records), failures(self.records))
        return [line for text in found for line in text.splitlines()]

    def meanings(self) -> list[Meaning]:
        """Return what each label stands for: method, options, the command that makes its rows again."""
        return meanings(self)

    def table(self) -> pandas.DataFrame:
        """Return one row per job, every figure as text: the table of the terminal."""
        return table.rows(self.records)

    def summary(self) -> pandas.DataFrame:
        """Return one row per label and pattern, as text: metrics with standard deviations over seeds, and the cost."""
        return table.summary(self)


def addressed(paths: Sequence[Path]) -> Results:
    """Return the results of run directories, or of the rows in them that addresses such as `DIR:wanda:2:4` name.

    Raises `NMBenchError` as `load_results` does, and for an address without a row.
    """
    addresses = [address_or_directory(path) for path in paths]
    directories = list(dict.fromkeys(address.directory for address in addresses))
    every = read(directories)
    chosen: set[int] = set()
    for address in addresses:
        own = dataclasses.replace(every, records=of_run(every, address.directory)).only(*address.choice)
        chosen |= {id(record) for record in own.records}
    return together(dataclasses.replace(every, records=[record for record in every.records if id(record) in chosen]))


def together(results: Results) -> Results:
    """Return results of several directories with the seeds of each row joined (`nmbench.results.joining`)."""
    several = len(results.directories) > 1
    return dataclasses.replace(results, records=joined(results.records)) if several else results


def load_results(*directories: str | os.PathLike[str]) -> Results:
    """Return the results of run directories; of several directories, each record has its own in `directory`.

    Rows that are the same work at other seeds are joined: means and intervals are over the seeds of all directories.
    Raises `NMBenchError` if a directory holds no records.
    """
    return together(read([Path(directory) for directory in directories]))


def read(paths: Sequence[Path]) -> Results:
    """Return the records of run directories as they are. Raises `NMBenchError` if a directory holds none."""
    records: list[Record] = []
    for path in paths:
        if not (path / "records.jsonl").is_file():
            raise NMBenchError(f"{path} is not a run directory: it has no records.jsonl.")
        where = {"directory": str(path)} if len(paths) > 1 else {}
        records += [cast(Record, {**record, **where}) for record in RunDirectory(path).records()]
    return Results(records, list(paths))
