"""What the sections of the page show: protocols with their letters, rows over seeds, standings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from typing import Any

import nmbench
from nmbench.evaluation import Difference
from nmbench.results import COSTS, Record, Standing, cost_of, front_of, in_order, loss_of, pattern_of, standings
from nmbench_plugins.publish.page.markup import short

FIRST = "first metric"  # of each protocol, where protocols begin with different ones
MANY = 12  # rows of a matrix, lines of a chart


@dataclass(frozen=True)
class Line:
    """One row of the table: a label at a pattern, over the seeds of `records`; failed and dense rows as well.

    `letter`: the protocol. `run`: the run directory, the first one of joined seeds. `name`: unique among the lines of a
    protocol and pattern. `fronts`: costs at which no other row of the protocol and pattern is both better and cheaper.
    """

    anchor: str
    letter: str
    run: str
    name: str
    records: Sequence[Record]
    fronts: Sequence[str] = ()

    @property
    def record(self) -> Record:
        """The record of the first seed."""
        return self.records[0]

    @property
    def label(self) -> str:
        """The label of the row."""
        return self.record["label"]

    @property
    def pattern(self) -> str:
        """The pattern with the layers that have another one; `-` for the dense row."""
        return pattern_of(self.record)

    @property
    def failed(self) -> bool:
        """True if the job failed."""
        return self.record["status"] != "ok"

    @property
    def seeds(self) -> list[int]:
        """The seeds of the row; none for the dense row."""
        return [record["seed"] for record in self.records if record["seed"] is not None]

    @property
    def runs(self) -> list[str]:
        """The run directories that hold the seeds of the row."""
        return list(dict.fromkeys(record.get("directory", self.run) for record in self.records))

    @cached_property
    def costs(self) -> Mapping[str, float]:
        """Mean cost by kind, those kinds that are known for every seed."""
        found = [] if self.failed or not self.record["pattern"] else [cost_of(record) for record in self.records]
        kinds = [kind for kind in COSTS if found and all(kind in one for one in found)]
        return {kind: fmean(one[kind] for one in found) for kind in kinds}

    @property
    def copied(self) -> bool:
        """True if the figures are those of another row that did the same work."""
        return self.record["copied_from"] is not None

    def loss(self, metric: str) -> float:
        """The mean of a metric over seeds, turned round if larger is better; NaN if a seed lacks it."""
        found = [loss_of(record["metrics"][metric]) for record in self.records if metric in record["metrics"]]
        return fmean(found) if len(found) == len(self.records) else float("nan")

    def over_dense(self, text: str) -> Difference | None:
        """The recorded difference to dense on a text: of one seed with its interval, of several their mean without."""
        found = [known[text] for record in self.records if text in (known := record.get("against_dense", {}))]
        if not found:
            return None
        mean, nan = fmean(one["mean"] for one in found), float("nan")
        low, high = (found[0]["low"], found[0]["high"]) if len(found) == 1 else (nan, nan)
        return Difference(mean, low, high, found[0]["windows"])


@dataclass(frozen=True)
class Protocol:
    """One protocol: its letter on the page, its digest, and the run directories and models of its rows."""

    letter: str
    digest: str
    model: str
    runs: Sequence[str]
    metrics: Sequence[str]
    lines: Sequence[Line]

    def named(self, metric: str) -> str:
        """A metric by its name, or the first one of the protocol."""
        return next(iter(self.metrics), "") if metric == FIRST else metric

    def patterns(self) -> list[str]:
        """The patterns of the rows, in the order of the records."""
        return list(dict.fromkeys(line.record["pattern"] for line in self.lines if line.record["pattern"]))

    def at(self, pattern: str) -> list[Line]:
        """The rows of one pattern that ended well."""
        return [line for line in self.lines if line.record["pattern"] == pattern and not line.failed]

    @property
    def title(self) -> str:
        """Model and letter."""
        return f"{self.model} (protocol {self.letter})"

    def unranked(self, text: str) -> bool:
        """True if the dense model does not predict a text, so that rows are not ranked by it."""
        return any(text in record.get("unranked", ()) for line in self.lines for record in line.records)

    def text(self) -> str | None:
        """The text that rows are judged by: the first one with differences to dense."""
        return next((text for line in self.lines for text in line.record.get("against_dense", {})), None)


@dataclass(frozen=True)
class View:
    """Everything that the page shows."""

    results: nmbench.Results
    protocols: Sequence[Protocol]
    standings: Sequence[Standing]

    def letter(self, digest: str) -> str:
        """The letter of a protocol."""
        return next(protocol.letter for protocol in self.protocols if protocol.digest == digest)

    def standing(self, protocol: Protocol, pattern: str, text: str | None) -> Standing | None:
        """The standing of a protocol and pattern on a text; None if losses are missing."""
        wanted = (protocol.digest, pattern, text)
        return next((one for one in self.standings if (one.protocol, one.pattern, one.text) == wanted), None)

    @property
    def groups(self) -> list[tuple[Protocol, str]]:
        """Every protocol with each of its patterns: the rows of a group are comparable."""
        return [(protocol, pattern) for protocol in self.protocols for pattern in protocol.patterns()]

    @property
    def metrics(self) -> list[str]:
        """The metrics of all protocols; `FIRST` before them where protocols begin with different ones."""
        several = len({protocol.named(FIRST) for protocol in self.protocols}) > 1
        every = dict.fromkeys(name for protocol in self.protocols for name in protocol.metrics)
        return [*([FIRST] if several else []), *every]

    @property
    def lines(self) -> list[Line]:
        """The rows of all protocols."""
        return [line for protocol in self.protocols for line in protocol.lines]


def view(results: nmbench.Results) -> View:
    """Return what the page shows of results."""
    digests = dict.fromkeys(record.get("protocol_digest", "") for record in results.records)
    protocols: list[Protocol] = []
    for digest in digests:
        records = [record for record in results.records if record.get("protocol_digest", "") == digest]
        protocols.append(protocol_of(records, letter(len(protocols)), results))
    return View(results, protocols, standings(results))


def letter(index: int) -> str:
    """Return `A` to `Z`, then `A1`."""
    return ascii_uppercase[index % 26] + (str(index // 26) if index >= 26 else "")


def protocol_of(records: Sequence[Record], letter: str, results: nmbench.Results) -> Protocol:
    """Return the protocol of records that share one."""
    runs = list(dict.fromkeys(run_of(record, results) for record in records))
    metrics = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    found = with_fronts(lines_of(in_order(records), letter, results), metrics[:1])
    return Protocol(
        letter, records[0].get("protocol_digest", ""), short(records[0].get("model", "")), runs, metrics, found
    )


def run_of(record: Record, results: nmbench.Results) -> str:
    """Return the run directory of a record."""
    return str(record.get("directory", results.directories[0]))


def lines_of(records: Sequence[Record], letter: str, results: nmbench.Results) -> list[Line]:
    """Return a line for every row over its seeds, and one for every job that failed; dense once."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        run = str(record.get("row_directory", run_of(record, results))) if record["pattern"] else ""
        failed = record["seed"] if record["status"] != "ok" else None
        groups.setdefault((run, record["label"], record["pattern"], record["status"], failed), []).append(record)
    labels = [key[1:3] for key in groups if key[3] == "ok"]
    lines = []
    for number, ((run, label, pattern, _, _), group) in enumerate(groups.items()):
        name = label if labels.count((label, pattern)) <= 1 else f"{Path(run).name}:{label}"
        where = run or run_of(group[0], results)
        own = sorted(group, key=lambda record: record["seed"] or 0) if pattern else group[:1]
        lines.append(Line(f"row-{letter}{number}", letter, where, name, own))
    return lines


def with_fronts(lines: Sequence[Line], metric: Sequence[str]) -> list[Line]:
    """Return the lines of a protocol with the costs on whose fronts they are, among the rows of their pattern."""
    on: dict[str, list[str]] = {}
    for pattern in dict.fromkeys(line.record["pattern"] for line in lines if line.record["pattern"]):
        for kind in COSTS if metric else ():
            known = [line for line in lines if line.record["pattern"] == pattern and kind in line.costs]
            points = {line.anchor: (line.loss(metric[0]), line.costs[kind]) for line in known}
            for anchor in front_of({key: point for key, point in points.items() if point[0] == point[0]}, kind):
                on.setdefault(anchor, []).append(kind)
    return [dataclasses.replace(line, fronts=on.get(line.anchor, ())) for line in lines]
