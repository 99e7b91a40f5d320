"""One side of a comparison of two runs: its rows, their losses, its specification and its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nmbench.errors import NMBenchError
from nmbench.results.directory import RunDirectory
from nmbench.results.format import Record
from nmbench.results.ranking import Row, rows_of
from nmbench.results.results import Results

Key = tuple[str, str | None]  # label and pattern of a row


@dataclass(frozen=True)
class Side:
    """The results of one run directory, with `about`, its manifest, and `settings`, what its protocol is made of."""

    results: Results
    about: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.results.directories[0]

    @property
    def model(self) -> str:
        """The reference of the model."""
        return self.results.records[0]["model"]

    @property
    def protocol(self) -> str:
        """The digest of the protocol, which all rows of a run directory share."""
        return str(self.results.records[0].get("protocol_digest"))

    @cached_property
    def rows(self) -> dict[Key, Row]:
        """The rows that ended well, dense among them, over their seeds."""
        records, found = self.results.records, {}
        for pattern in dict.fromkeys(record["pattern"] or "" for record in records):
            for row in rows_of(records, self.results, pattern):
                found[row.record["label"], row.record["pattern"]] = row
        return found

    @property
    def metrics(self) -> list[str]:
        """The metrics of the rows."""
        return list(dict.fromkeys(name for record in self.results.records for name in record["metrics"]))

    def records_of(self, key: Key) -> dict[int | None, Record]:
        """Return the records of a row that ended well, by seed."""
        found = (r for r in self.results.records if (r["label"], r["pattern"]) == key and r["status"] == "ok")
        return {record["seed"]: record for record in found}

    @property
    def failed(self) -> list[Record]:
        """The records of jobs that failed."""
        return [record for record in self.results.records if record["status"] != "ok"]


def side(results: Results) -> Side:
    """Return one side. Raises `NMBenchError` for a run directory without a record."""
    if not results.records:
        raise NMBenchError(f"{results.directories[0]} holds no finished row; give the command of its run again.")
    directory = RunDirectory(results.directories[0])
    spec = directory.spec()
    return Side(results, directory.manifest(), spec.protocol() if spec else {})


def refuse_unlike(a: Side, b: Side) -> None:
    """Raise `NMBenchError` for runs of two models, and for runs without a row or a metric in common."""
    digests = [one.about.get("model_digest") for one in (a, b)]
    if a.model != b.model and (None in digests or digests[0] != digests[1]):
        raise unlike(a, b, f"{a.directory} is of {a.model}, {b.directory} of {b.model}", "runs of one model")
    if not any(key[1] and a.records_of(key).keys() & b.records_of(key).keys() for key in a.rows):
        raise unlike(a, b, f"no row is in both ({listed(a)}; and {listed(b)})", "rows of one label, pattern and seed")
    if not comparable_metrics(a, b):
        both = f"{', '.join(a.metrics)} and {', '.join(b.metrics)}"
        raise unlike(a, b, f"no metric is the same on the same test tokens ({both})", "runs with one --metric")


def unlike(a: Side, b: Side, why: str, remedy: str) -> NMBenchError:
    """Return the refusal of two runs."""
    return NMBenchError(f"{a.directory} and {b.directory} cannot be compared: {why}; compare {remedy}.")


def listed(one: Side) -> str:
    """Return the names of the pruned rows of a run, with their seeds."""
    names = (f"{named(key)} seed {', '.join(map(str, one.records_of(key)))}" for key in one.rows if key[1])
    return ", ".join(names) or "none"


def named(key: Key) -> str:
    """Return label and pattern: `wanda 2:4`, `dense`."""
    return " ".join(filter(None, key))


def comparable_metrics(a: Side, b: Side) -> list[str]:
    """Return the metrics of both runs, without those of a text whose tokens are not the same in both."""
    other = other_texts(a, b)
    return [name for name in a.metrics if name in b.metrics and text_of(name) not in other]


def other_texts(a: Side, b: Side) -> Sequence[str]:
    """Return the test texts that both runs name and whose tokens differ."""
    first, second = (one.about.get("test_digests", {}) for one in (a, b))
    return [name for name in first if name in second and first[name] != second[name]]


def text_of(metric: str) -> str:
    """Return the text that a metric reads: `demo` of `ppl:demo@256+bos`; something that is no text for others."""
    return metric.partition(":")[2].rpartition("@")[0]
