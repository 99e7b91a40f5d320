"""The table at the end of a run: rows, means over seeds, and the rankings with their significance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nmbench.results.doubt_lines import doubt_lines
from nmbench.results.format import Interval, Record
from nmbench.results.pareto import loss_of, pareto, quality, row_key
from nmbench.results.precision import decimals_of_mean, printed
from nmbench.results.ranking import comparisons, grouped, of_run, pattern_of
from nmbench.results.records import Rows, identity
from nmbench.results.sampled_note import sampled_notes
from nmbench.results.table_width import fitted
from nmbench.sources import ValueRecord

if TYPE_CHECKING:
    import pandas

MEBIBYTE = 2**20
LONG, BUSY = 5.0, 0.7  # seconds; processor seconds per second under which a machine was busy


def render(results: Rows, width: int | None = None) -> str:
    """The whole text for a terminal: one row per job, means over seeds, rankings, failures, doubts.

    Of tables wider than `width` columns the least important columns are left out; None: nothing is.
    """
    shown = asked_rows(results)
    parts = [fitted(rows(in_order(shown)), width)]
    if more := len(results.records) - len(shown):
        parts.append(f"{more} more rows of other commands: nmbench report {results.directories[0]}")
    if len({record["seed"] for record in results.records if record["seed"] is not None}) > 1:
        parts.append("Mean over seeds (± standard deviation)\n" + fitted(means(results), width))
    ranked = "\n".join([*comparisons(results), *pareto_note(results.records)])
    notes = "\n".join(filter(None, (sampled_notes(shown), fallbacks(results.records), kept_weights(shown))))
    parts += [ranked, notes, failures(results.records), "\n".join(doubt_lines(shown))]
    return "\n\n".join(filter(None, parts))


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


def fallbacks(records: Sequence[Record]) -> str:
    """One line for every row that is not, or hardly, what its method asks for: a copy, a repair that is not
    better than its start, statistics of too few tokens.
    """
    lines = []
    for r in records:
        unreached, few = r["experts"].get("never_reached", []), r["experts"].get("under_calibrated", {})
        parts = [
            f"no token was routed to {len(unreached)} weights of experts, as {unreached[0]}: pruned by the "
            f"statistics of all tokens"
            for _ in unreached[:1]
        ]
        parts += [
            f"fewer tokens than inputs were routed to {len(few)} weights of experts, as {tokens} to {name}"
            for name, tokens in sorted(few.items(), key=lambda item: item[1])[:1]
        ]
        if undone(r):
            found = r["notes"]["confirmation"]
            parts.append(
                f"{found['windows']} unseen selection windows do not confirm that the repair is better than its start "
                f"{r['started_from']} ({found['nats']:+.4f} nats): the weights of the start are measured"
            )
        if waited(r):
            parts.append(
                f"pruning took {r['seconds']['prune']:.1f} s, in which processors worked {worked(r):.1f} s: "
                f"the machine was busy, and seconds say little"
            )
        if r["copied_from"]:
            parts.append(f"the same work as {r['copied_from']}, done once; all figures are copied from there")
        if parts:
            lines.append(f"NOTE {r['label']} {r['pattern']} seed {r['seed']}: {'; '.join(parts)}.")
    return "\n".join(lines)


def undone(record: Record) -> bool:
    """True if the host returned to the start of a repair, which unseen selection windows did not confirm."""
    confirmation = record["notes"].get("confirmation") if record.get("repairs") else None
    return confirmation is not None and not confirmation["holds"]


def kept_weights(records: Sequence[Record]) -> str:
    """One line on the size of the repaired weights in the run directory; nothing if there are none."""
    sizes = [size for record in records if (size := record.get("kept_bytes"))]
    if not sizes:
        return ""
    rows_text = "1 row" if len(sizes) == 1 else f"{len(sizes)} rows"
    return (
        f"NOTE weights/ holds the repaired weights of {rows_text}, {sum(sizes) / MEBIBYTE:.1f} MiB; with "
        f"--no-keep-weights, `nmbench export` makes them again."
    )


def waited(record: Record) -> bool:
    """True if pruning on a CPU was long and waited for most of the time, for other processes."""
    worked_seconds, seconds = worked(record), record["seconds"]["prune"]
    on_cpu = record["environment"].get("device") == "cpu"
    if worked_seconds is None or seconds is None:
        return False
    return on_cpu and seconds > LONG and worked_seconds < BUSY * seconds


def worked(record: Record) -> float | None:
    """Processor seconds of pruning; of older records the share of the process that ended the job, times its seconds."""
    seconds = record["seconds"]
    if seconds["prune_cpu"] is not None or seconds["cpu_share"] is None or seconds["prune"] is None:
        return seconds["prune_cpu"]
    return seconds["cpu_share"] * seconds["prune"]


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
    groups = (item for directory in results.directories for item in grouped(of_run(results, directory)).items())
    for (label, _), group in groups:
        names = dict.fromkeys(name for record in group for name in record["metrics"])
        shown = {name: over_seeds([record["metrics"][name] for record in group]) for name in names}
        run = {"run": group[0]["directory"]} if "directory" in group[0] else {}
        lines.append({**run, "label": label, "pattern": pattern_of(group[0]), "seeds": str(len(group)), **shown})
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
    groups = (group for directory in results.directories for group in grouped(of_run(results, directory)).values())
    for group in groups:
        lines.append(
            {
                "weights": "updated" if group[0]["weights_changed"] else "dense",
                "prune seconds": f"{sum(r['seconds']['prune'] or 0.0 for r in group) / len(group):.1f}",
                "tokens": tokens(group[0]),
                "pareto": " ".join(fronts.get(row_key(group[0]), ())) or "-",
            }
        )
    return pandas.concat([means(results), pandas.DataFrame(lines)], axis=1).fillna("-")


def pareto_note(records: Sequence[Record]) -> list[str]:
    """Return the line that explains the Pareto column, if the table has this column."""
    if not any(front_columns(records)):
        return []
    return [
        f"Pareto: costs (seconds to prune; forward + 2 x backward tokens; peak bytes of a GPU) at which no row of the "
        f"same pattern is both better by {quality(records)} and cheaper"
    ]


def failures(records: Sequence[Record]) -> str:
    """One line for every job that failed."""
    return "\n".join(
        f"FAILED {r['label']} {r['pattern']} seed {r['seed']}: {r['error']} (traceback: {r['traceback']})"
        for r in records
        if r["status"] != "ok"
    )
