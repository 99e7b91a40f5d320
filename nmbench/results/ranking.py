"""Rankings of rows on the same text: which rows a paired comparison can tell apart.

Rows are ranked together if they share a protocol, whichever run directories they are in, and compared on the seeds that
all of them have.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nmbench.comparison import Difference, paired
from nmbench.results import address
from nmbench.results.doubt_lines import is_unranked, unranked_texts
from nmbench.results.files import read_tensors
from nmbench.results.format import Record
from nmbench.results.records import Rows
from nmbench.sources import ValueRecord
from nmbench.spec import DENSE

HEAD = "Ranking, best first: '<' told apart (paired 95 % interval), '~' not, '=' same"
LOSS = ValueRecord(lower_is_better=True, unit="nats")


@dataclass
class Row:
    """One label at one pattern, over its seeds: losses and figures by seed and text, float64 `[windows]` each.

    The dense row has the seed None, which stands for every seed. `directory` is the first of the run directories of
    the row, `runs` are all of them.
    """

    name: str
    directory: Path
    record: Record
    losses: dict[int | None, dict[str, Tensor]] = field(default_factory=dict)
    runs: tuple[Path, ...] = ()

    @property
    def seeds(self) -> set[int]:
        """The seeds of the row; none for the dense row."""
        return {seed for seed in self.losses if seed is not None}

    def on(self, text: str, seeds: Sequence[int]) -> Tensor | None:
        """Losses `[seeds, windows]` on a text, or None if one is missing."""
        found = [self.losses.get(seed, self.losses.get(None, {})).get(text) for seed in seeds]
        present = [losses for losses in found if losses is not None]
        return torch.stack(present) if present and len(present) == len(found) else None


def comparisons(results: Rows) -> list[str]:
    """The lines of all rankings, by protocol, pattern and text; nothing where there is nothing to rank."""
    protocols = dict.fromkeys(record.get("protocol_digest") for record in results.records)
    several = len(protocols) > 1
    lines = []
    for protocol in protocols:
        records = [record for record in results.records if record.get("protocol_digest") == protocol]
        where = f"{' + '.join(directories_of(records, results))} " if several else ""
        for pattern in dict.fromkeys(record["pattern"] for record in records if record["pattern"]):
            lines += [f"  {where}{line}" for line in ranking(records, results, pattern)]
    return [HEAD, *lines] if lines else []


def directories_of(records: Sequence[Record], results: Rows) -> list[str]:
    """The run directories of records, each once."""
    return list(dict.fromkeys(str(directory_of(record, results)) for record in records))


def directory_of(record: Record, results: Rows) -> Path:
    """The run directory of a record."""
    return Path(record["directory"]) if "directory" in record else results.directories[0]


def row_directory(record: Record, results: Rows) -> Path:
    """The run directory that stands for the row of a record: the first of those that hold its seeds."""
    return Path(record["row_directory"]) if "row_directory" in record else directory_of(record, results)


def ranking(records: Sequence[Record], results: Rows, pattern: str) -> Iterator[str]:
    """The ranking of one pattern on every text, and the gain of each learner over its start."""
    rows = list(rows_of(records, results, pattern))
    shown = next(pattern_of(record) for record in records if record["pattern"] == pattern)
    seeds = common_seeds(rows)
    unranked = unranked_texts(records)
    for text in dict.fromkeys(text for row in rows for found in row.losses.values() for text in found):
        metric = next((r.record["metrics"][text] for r in rows if text in r.record["metrics"]), LOSS)
        if is_unranked(text, unranked):
            yield f"{shown} {text}: no ranking, because the dense model does not predict this text (DOUBT below)"
        else:
            yield f"{shown} {text}: {order_of(rows, text, seeds, metric['lower_is_better'])}"
        if seeds:
            yield from (f"{shown} {text}: {line}" for line in gains(rows, text, metric.get("unit", "")))
            yield from (f"{shown} {text}: {line}" for line in by_start(rows, text))


def order_of(rows: Sequence[Row], text: str, seeds: Sequence[int], lower_is_better: bool) -> str:
    """The order of rows on one text over common seeds, or why there is none."""
    if not seeds:
        listed = "; ".join(f"{row.name}: {', '.join(map(str, sorted(row.seeds)))}" for row in rows if row.seeds)
        return f"no ranking, because the rows have no seed in common ({listed})"
    here = {row.name: losses for row in rows if (losses := row.on(text, seeds)) is not None}
    return f"{chain(here, lower_is_better)}{remark(rows, seeds)}"


def rows_of(records: Sequence[Record], results: Rows, pattern: str) -> Iterator[Row]:
    """The rows of one pattern, and the dense row, with their losses.

    A label in two directories has two rows, unless their seeds are joined.
    """
    groups: dict[tuple[str, Path], list[Record]] = {}
    for record in records:
        if record["status"] == "ok" and record["pattern"] in (pattern, None):
            directory = row_directory(record, results) if record["pattern"] else Path()  # one dense row is enough
            groups.setdefault((record["label"], directory), []).append(record)
    labels = [label for label, _ in groups]
    for (label, directory), group in groups.items():
        row = Row(label if labels.count(label) == 1 else f"{directory.name}:{label}", directory, group[0])
        row.runs = tuple(dict.fromkeys(directory_of(record, results) for record in group))
        for record in group:
            path = directory_of(record, results) / "losses" / f"{file_name(record)}.safetensors"
            if path.exists():
                row.losses[record["seed"]] = read_tensors(path)[0]
        yield row


def common_seeds(rows: Sequence[Row]) -> list[int]:
    """The seeds that all rows have, the dense row aside; [0], which stands for any, if there is no other row."""
    found = [row.seeds for row in rows if row.seeds]
    return sorted(set.intersection(*found)) if found else [0]


def remark(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """The seeds that count, where some row has more."""
    if all(row.seeds <= set(seeds) for row in rows):
        return ""
    return f" ({named_seeds(seeds)}, which all rows have)"


def named_seeds(seeds: Sequence[int]) -> str:
    """Return seeds as text: `seed 0`, `seeds 0, 1`."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def gains(rows: Sequence[Row], text: str, unit: str) -> Iterator[str]:
    """The paired difference of every learner and repair to the row that it began with, on the seeds that both have.

    A mask learner has none to a start whose weights were repaired, because it had only its mask.
    """
    by_label = {(run, row.record["label"]): row for row in rows for run in row.runs}
    for row in rows:
        starts = (by_label.get((run, str(row.record["started_from"]))) for run in row.runs)
        start = next((found for found in starts if found is not None), None)
        repairs = row.record.get("repairs")
        if start is None or (start.record.get("weights_changed") and not repairs):
            continue
        seeds = sorted(row.seeds & start.seeds)
        own, reference = row.on(text, seeds), start.on(text, seeds)
        if own is not None and reference is not None:
            gained = difference(own, reference)
            what = f"its start {start.name}" if repairs else "its initial mask"
            yield f"{row.name} against {what} {gained} {unit} ({gained.windows} windows)"


def by_start(rows: Sequence[Row], text: str) -> Iterator[str]:
    """The ranking of the starts of every repair that has several: whether they still differ after it."""
    for repair in dict.fromkeys(row.record.get("repairs") for row in rows):
        same = [row for row in rows if repair and row.record.get("repairs") == repair]
        seeds = common_seeds(same)
        figures = {str(row.record["started_from"]): row.on(text, seeds) for row in same}
        known = {start: losses for start, losses in figures.items() if losses is not None}
        if len(known) > 1:
            best, *_, worst = sorted(known, key=lambda start: float(known[start].mean()))
            spread = f"{worst} over {best} {difference(known[worst], known[best])} nats"
            yield f"after {repair}, by start: {chain(known)}; {spread}{remark(same, seeds)}"


def chain(figures: Mapping[str, Tensor], lower_is_better: bool = True) -> str:
    """`dense < sparsegpt < wanda ~ magnitude`, best first; `=` joins rows of the very same figures."""
    losses = figures if lower_is_better else {label: -values for label, values in figures.items()}
    order = sorted(losses, key=lambda label: float(losses[label].mean()))
    text = order[0]
    for better, worse in itertools.pairwise(order):
        found = difference(losses[worse], losses[better])
        sign = "<" if found.clear else "=" if found.low == found.high == 0 else "~"
        text += f" {sign} {worse}"
    return text


def difference(losses: Tensor, reference: Tensor) -> Difference:
    """The paired difference over windows of losses `[seeds, windows]`, each row averaged over its seeds."""
    return paired(losses.mean(dim=0), reference.mean(dim=0))


def file_name(record: Record) -> str:
    """The name of a job's files, from its record."""
    if record["label"] == DENSE:
        return DENSE
    return address.file_name(record["label"], record["pattern"], record["seed"])


def pattern_of(record: Record) -> str:
    """The pattern of a row, with the layers that have another one: `2:4, mlp.* 4:8`."""
    special = [f"{layers} {pattern}" for layers, pattern in record.get("pattern_for", {}).items()]
    return ", ".join([record["pattern"] or "-", *special])


def of_run(results: Rows, directory: Path) -> list[Record]:
    """The records of one run directory."""
    return [record for record in results.records if record.get("directory", str(directory)) == str(directory)]


def of_rows(results: Rows, run: Path) -> list[Record]:
    """The records of all rows for which a run directory stands."""
    return [record for record in results.records if row_directory(record, results) == run]


def row_groups(results: Rows) -> list[list[Record]]:
    """The records that ended well of every row, by run directory, label and pattern, joined seeds together."""
    found: list[list[Record]] = []
    for run in results.directories:
        found += grouped(of_rows(results, run)).values()
    return found


def grouped(records: Sequence[Record]) -> dict[tuple[str, str | None], list[Record]]:
    """The records that ended well, by label and pattern, over all seeds."""
    groups: dict[tuple[str, str | None], list[Record]] = {}
    for record in records:
        if record["status"] == "ok":
            groups.setdefault((record["label"], record["pattern"]), []).append(record)
    return groups
