"""The tables of a run as frames of text: one row per job, means over seeds, and a summary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nmbench.results.format import Interval, Record
from nmbench.results.pareto import loss_of, pareto, quality, row_key
from nmbench.results.precision import decimals_of_mean, printed
from nmbench.results.ranking import pattern_of, row_groups
from nmbench.results.records import Rows, identity
from nmbench.sources import ValueRecord

if TYPE_CHECKING:
    import pandas

MEBIBYTE = 2**20
AND = " + "  # between the run directories of a row


def asked_rows(results: Rows) -> Sequence[Record]:
    """The rows that this command asked for; all rows where no command asked."""
    wanted = {identity(record) for record in results.asked}
    return [record for record in results.records if identity(record) in wanted] if wanted else results.records


def in_order(records: Sequence[Record]) -> list[Record]:
    """Dense first, then by pattern in the order of the records, best first by the run's first metric, failures last."""
    patterns = list(dict.fromkeys(record["pattern"] for record in records if record["pattern"]))
    name = quality(records)

    def place(record: Record) -> tuple[int, bool, float]:
        value = record["metrics"].get(name) if name else None
        loss = loss_of(value) if value else math.inf
        return (patterns.index(record["pattern"]) if record["pattern"] else -1, record["status"] != "ok", loss)

    return sorted(records, key=place)


def rows(records: Sequence[Record]) -> pandas.DataFrame:
    """One row per job, every figure as people read it."""
    import pandas

    lines = [{**row(record), **fronts} for record, fronts in zip(records, front_columns(records), strict=True)]
    columns = dict.fromkeys(name for line in sorted(lines, key=len, reverse=True) for name in line)
    return pandas.DataFrame(lines, columns=list(columns)).fillna("-")


def row(record: Record) -> dict[str, str]:
    """Return the cells of one record. Differences are nats per token, with their paired 95 % interval."""
    failed = record["status"] != "ok"
    return {
        **({"run": record["directory"]} if "directory" in record else {}),
        "label": record["label"],
        "pattern": pattern_of(record),
        "seed": "-" if record["seed"] is None else str(record["seed"]),
        "strict": "FAILED" if failed else strictness(record),
        **{name: figure(value) for name, value in record["metrics"].items()},
        **{f"nats over dense, {name}": interval(value) for name, value in record.get("against_dense", {}).items()},
        "in N:M": "-" if record["coverage"] is None else f"{record['coverage']['share_of_decoder']:.1%}",
        "weights": "-" if failed else "updated" if record["weights_changed"] else "dense",
        "prune s": "-" if failed or not record["pattern"] else f"{record['seconds']['prune']:.1f}",
        "MiB grown": "-" if failed else peak(record),
        "tokens": "-" if failed else tokens(record),
    }


def figure(value: ValueRecord) -> str:
    """A metric's value, in the digits that its standard error justifies, and what it is of where the metric says so."""
    return f"{printed(value)} {value.get('where', '')}".rstrip()


def tokens(record: Record) -> str:
    """Tokens passed forward, and backward if there are any; imported masks without a record have unknown tokens."""
    if record["cost"]["forward_tokens"] is None:
        return "unknown"
    forward, backward = record["cost"]["forward_tokens"], record["cost"].get("backward_tokens", 0)
    return f"{forward} + {backward} back" if backward else str(forward)


def front_columns(records: Sequence[Record]) -> list[dict[str, str]]:
    """For every record the costs on whose Pareto front it is; nothing if there are not two rows to compare."""
    fronts = pareto(records)
    if len({key[:2] for key in fronts}) < 2:
        return [{} for _ in records]
    return [{"pareto": " ".join(fronts.get(row_key(record), ())) or "-"} for record in records]


def strictness(record: Record) -> str:
    """The proof in a few characters: how many groups were checked."""
    return f"yes, {record['proof']['groups']} groups" if record["proof"] else "-"


def interval(value: Interval) -> str:
    return f"{value['mean']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"


def peak(record: Record) -> str:
    """Growth of host memory over the loaded model and, where there is one, peak device memory."""
    found = record["peak_bytes"]
    growth = found["host"] if found["host_growth"] is None else found["host_growth"]
    sizes = [growth, found["device"]]
    return " + ".join(f"{size / MEBIBYTE:.0f}" for size in sizes if size is not None)


def means(results: Rows) -> pandas.DataFrame:
    """Mean and standard deviation of every metric over seeds, by run, label and pattern."""
    import pandas

    lines = []
    for group in row_groups(results):
        names = dict.fromkeys(name for record in group for name in record["metrics"])
        shown = {name: over_seeds([record["metrics"][name] for record in group]) for name in names}
        runs = dict.fromkeys(record["directory"] for record in group if "directory" in record)
        run = {"run": AND.join(runs)} if runs else {}
        lines.append(
            {**run, "label": group[0]["label"], "pattern": pattern_of(group[0]), "seeds": str(len(group)), **shown}
        )
    return pandas.DataFrame(lines)


def over_seeds(metrics: Sequence[ValueRecord]) -> str:
    """Mean and, of several seeds, standard deviation of one metric."""
    import pandas

    values, digits = pandas.Series([metric["value"] for metric in metrics]), decimals_of_mean(metrics)
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def summary(results: Rows) -> pandas.DataFrame:
    """One row per label and pattern: `means`, whether weights changed, mean seconds and tokens, Pareto fronts."""
    import pandas

    fronts = pareto(results.records)
    lines = []
    for group in row_groups(results):
        lines.append(
            {
                "weights": "updated" if group[0]["weights_changed"] else "dense",
                "prune seconds": f"{sum(r['seconds']['prune'] or 0.0 for r in group) / len(group):.1f}",
                "tokens": tokens(group[0]),
                "pareto": " ".join(fronts.get(row_key(group[0]), ())) or "-",
            }
        )
    return pandas.concat([means(results), pandas.DataFrame(lines)], axis=1).fillna("-")
