"""The big table: every method on a real model, from one or several finished runs of one protocol.

    nmbench run --config smollm2.toml --model FOLDER --calibration ... --metric ... --out RUN
    python real_model.py RUN [RUN2 ...] --json results/real_model.json

One row per label and pattern, best first: every metric as mean over seeds, with the standard deviation over seeds, or
in brackets the standard error for a share of items; nats over dense and over the next better row of the same pattern,
with paired 95 % bootstrap intervals over windows; cost. Below the table stand the layers with the largest errors. Runs
are joined if their protocols are equal and no row is in two of them; a seed may be a run of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nmbench import NMBenchError, Results, load_results
from nmbench.comparison import Difference, paired
from nmbench.results.files import read_tensors
from nmbench.results.pareto import cost_of
from nmbench.results.ranking import file_name, grouped
from nmbench.results.records import identity
from nmbench.results.table import tokens

WORST = 3
Record = dict[str, Any]


class Row(NamedTuple):
    """One label at one pattern, over its seeds; `losses`: float64 `[windows]`, mean over seeds, on the first text."""

    label: str
    pattern: str | None
    records: list[Record]
    losses: Tensor

    def values(self, metric: str) -> list[float]:
        return [record["metrics"][metric]["value"] for record in self.records if metric in record["metrics"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        results = load_results(*args.runs)
        rows = rows_of(results, args.runs)
    except NMBenchError as error:
        raise SystemExit(f"Error: {error}") from None
    print(table(rows), worst_layers(results), *results.protocol(), sep="\n\n")
    if args.json:
        args.json.write_text(json.dumps(summary(results, rows), indent=1) + "\n", encoding="utf-8")


def rows_of(results: Results, runs: Sequence[Path]) -> list[Row]:
    """All rows of the runs, dense first, then by pattern, best first.

    Raises `NMBenchError` if the runs are of different protocols, or if a row is in two of them.
    """
    done = [record for record in results.records if record["status"] == "ok"]
    if len({record["protocol_digest"] for record in done}) != 1:
        raise NMBenchError("the runs follow different protocols, or none is done; make a table for each by itself.")
    first = {identity(record): record for record in reversed(done)}  # the dense row is in every run
    twice = [record for record in done if record["pattern"] and first[identity(record)] is not record]
    if twice:
        raise NMBenchError(f"row {identity(twice[0])} is in two runs.")
    groups = grouped([record for record in done if first[identity(record)] is record])
    rows = [Row(*key, group, losses(group, runs[0])) for key, group in groups.items()]
    return sorted(rows, key=lambda row: (row.pattern or "", float(row.losses.mean())))


def losses(group: Sequence[Record], only: Path) -> Tensor:
    """Per-window losses on the first text, mean over the seeds of a row."""
    files = [Path(r.get("directory", only)) / "losses" / f"{file_name(r)}.safetensors" for r in group]
    return torch.stack([next(iter(text_losses(path))) for path in files]).double().mean(dim=0)  # [windows]


def text_losses(path: Path) -> list[Tensor]:
    """The losses of a text in a file, without the figures of metrics, whose names have a word and a colon in front."""
    kept = read_tensors(path)[0]
    return [kept[name] for name in kept if not re.match(r"(kl|top1|zeroshot):", name)]


def table(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    metrics = list(dict.fromkeys(name for row in rows for record in row.records for name in record["metrics"]))
    patterns = {row.pattern for row in rows if row.pattern}
    head = ["method", "weights", "seeds", *map(short, metrics), "nats over dense", "nats over the row above"]
    lines = [[*head, "seconds", "tokens", "peak GiB"]]
    for row, above in zip(rows, [None, *rows[:-1]], strict=True):
        cost = [cost_of(record) for record in row.records]
        lines.append(
            [
                row.label + (f" {row.pattern}" if row.pattern and len(patterns) > 1 else ""),
                "updated" if row.records[0]["weights_changed"] else "dense",
                str(len(row.records)),
                *(figure(row, metric) for metric in metrics),
                interval(over(row, rows[0])) if row.pattern else "",
                interval(over(row, above)) if above and above.pattern == row.pattern else "",
                f"{statistics.fmean(one['seconds'] for one in cost):.0f}" if all(cost) else "",
                tokens(row.records[0]),
                f"{max(one.get('bytes', 0) for one in cost) / 2**30:.2f}",
            ]
        )
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figure(row: Row, metric: str) -> str:
    """Mean over seeds ± standard deviation over seeds; of a share of items, also its standard error over items."""
    values = row.values(metric)
    if not values:
        return ""
    text = f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
    first = row.records[0]["metrics"][metric]
    return text + (f" ({first['stderr']:.3f})" if first.get("unit") == "share of items" and first["stderr"] else "")


def over(row: Row, other: Row) -> Difference:
    """The nats by which a row is worse than another, with their interval."""
    return paired(row.losses, other.losses)


def interval(difference: Difference) -> str:
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def worst_layers(results: Results) -> str:
    """The layers with the largest output error of every row, mean over seeds, as a Markdown list."""
    details = results.details()
    details = details[details["pattern"].notna()]
    lines = []
    for (label, pattern), rows in details.groupby(["label", "pattern"], sort=False):
        largest = rows.groupby("item")["value"].mean().nlargest(WORST)
        lines.append(f"- {label} {pattern}: " + ", ".join(f"{name} {error:.3f}" for name, error in largest.items()))
    return "\n".join(["Layers that hurt most, relative output error:", "", *lines]) if lines else ""


def short(text: str) -> str:
    """The name of a metric, or a text with such names, without the folders of files."""
    return re.sub(r"[^\s:`]*/", "", text)


def summary(results: Results, rows: Sequence[Row]) -> dict[str, Any]:
    """All figures of the table and of each seed, and the environment they depend on."""
    found = []
    for row, above in zip(rows, [None, *rows[:-1]], strict=True):
        beside = {"dense": rows[0]} if row.pattern else {}
        beside |= {"the row above": above} if above and above.pattern == row.pattern else {}
        seeds = [
            {
                "seed": record["seed"],
                "metrics": {short(name): without_detail(values) for name, values in record["metrics"].items()},
                **{name: record[name] for name in ("options", "seconds", "peak_bytes", "cost")},
            }
            for record in row.records
        ]
        differences = {f"nats over {name}": asdict(over(row, other)) for name, other in beside.items()}
        found.append({"label": row.label, "pattern": row.pattern, **differences, "seeds": seeds})
    return {"protocol": [short(line) for line in results.protocol()], "rows": found}


def without_detail(values: dict[str, Any]) -> dict[str, Any]:
    """The figures of a metric, reduced to the worst of its items."""
    items = sorted(values.get("detail", {}).items(), key=lambda item: -item[1])[:WORST]
    return {**{k: v for k, v in values.items() if k != "detail"}, **({"worst": dict(items)} if items else {})}


if __name__ == "__main__":
    main()
