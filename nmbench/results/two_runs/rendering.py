"""The comparison of two runs as text and JSON: what changed, a table for every metric, masks and cost, the verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from nmbench.results.ranking import named_seeds
from nmbench.results.table import over_seeds
from nmbench.results.two_runs.comparing import (
    BETTER,
    CHANGED,
    MIXED,
    SAME,
    UNKNOWN,
    WITHIN,
    WORSE,
    Change,
    Comparison,
    RowChange,
)
from nmbench.sources import ValueRecord

COSTS = {"seconds": "prune s, B / A", "tokens": "tokens, B / A", "bytes": "device bytes, B / A"}
UNCHANGED = "No option, version or device changed."
FEW = 3  # rows that the verdict names


def comparison_text(found: Comparison) -> str:
    """Return the comparison as people read it; the last line is the verdict."""
    heads = [f"{name}: {side.directory}, {side.model}" for name, side in (("A", found.a), ("B", found.b))]
    metrics = dict.fromkeys(change.metric for row in found.rows for change in row.changes)
    parts = [
        "\n".join(heads),
        changed("The protocols differ, so that no difference can be told from noise", found.protocol),
        changed("Changed" if found.protocol else "One protocol; changed", found.settings) or UNCHANGED,
        *(metric_table(found, metric) for metric in metrics),
        work_table(found.rows),
        *unknown(found),
        *(f"only in {name}: {', '.join(rows)}" for name, rows in (("A", found.only_a), ("B", found.only_b)) if rows),
        verdict_line(found),
    ]
    return "\n\n".join(filter(None, parts))


def changed(head: str, lines: Sequence[str]) -> str:
    """Return what changed, a line each, under a head; nothing without a line."""
    return "\n".join([f"{head}:", *(f"  {line}" for line in lines)]) if lines else ""


def metric_table(found: Comparison, metric: str) -> str:
    """Return the table of one metric: value in A and B, change with interval, verdict; same rows are only counted."""
    every = [(row, change) for row in found.rows for change in row.changes if change.metric == metric]
    shown = [(row, change) for row, change in every if change.verdict != SAME]
    if not shown:
        return f"{metric}: the same in {rows_text(len(every))}"
    units = dict.fromkeys(change.unit for _, change in shown if change.difference)
    unit = f", {next(iter(units))}" if any(units) else ""
    text = table((metric, "A", "B", f"B - A{unit} [95 %]", "verdict"), [cells(*pair) for pair in shown])
    same = len(every) - len(shown)
    return text + (f"\nthe same in {rows_text(same)}" if same else "")


def cells(row: RowChange, change: Change) -> tuple[str, ...]:
    """Return the cells of one row: name and seeds, A, B, change, verdict."""
    seeds = f" {named_seeds(row.seeds)}" if row.seeds else ""
    difference = "-" if change.difference is None else str(change.difference)
    a, b = (over_seeds(values).partition(" ±")[0] for values in (change.a, change.b))
    return row.name + seeds, a, b, difference, change.verdict


def work_table(rows: Sequence[RowChange]) -> str:
    """Return the table of masks and cost; nothing if no row has either."""
    lines = [(row.name, masks_text(row.masks), *(cost_text(row, kind) for kind in COSTS)) for row in rows]
    lines = [line for line in lines if set(line[1:]) != {"-"}]
    shown = [0, *(place for place in range(1, 5) if any(line[place] != "-" for line in lines))]
    heads = ("masks and cost", "bits that differ", *COSTS.values())
    return (
        table([heads[place] for place in shown], [[line[place] for place in shown] for line in lines]) if lines else ""
    )


def masks_text(share: float | None) -> str:
    """Return the share of mask bits that differ: `none`, `0.31 %`, or that they do."""
    if share is None:
        return "-"
    return "some (no masks kept)" if math.isnan(share) else f"{share:.2%}" if share else "none"


def cost_text(row: RowChange, kind: str) -> str:
    """Return the cost in A and B and their ratio: `9.5 -> 19.2 (x2.02)`."""
    if kind not in row.costs:
        return "-"
    a, b = row.costs[kind]
    ratio = f" (x{b / a:.2f})" if a else ""
    return f"{amount(a, kind)} -> {amount(b, kind)}{ratio}" if a != b else amount(a, kind)


def amount(value: float, kind: str) -> str:
    """Return a cost in figures."""
    return f"{value:.1f}" if kind == "seconds" else f"{value:.0f}"


def unknown(found: Comparison) -> Iterator[str]:
    """Yield why a change cannot be told from noise, once for every metric, unless the protocols differ."""
    if not found.protocol:
        every = (change for row in found.rows for change in row.changes if change.verdict == UNKNOWN)
        lines = dict.fromkeys(f"{UNKNOWN}: {change.metric}: {change.why}" for change in every)
        if lines:
            yield "\n".join(lines)


def verdict_line(found: Comparison) -> str:
    """Return the answer in one line: `B against A: of 3 rows 1 worse (wanda 2:4 +0.0123 nats); 2 the same.`"""
    if found.protocol:
        names = ", ".join(dict.fromkeys(line.partition(" ")[0] for line in found.protocol))
        return f"B against A: it cannot be told, because the protocols differ ({names})."
    words = {BETTER: "better", WORSE: "worse", MIXED: "better by one metric and worse by another"}
    words |= {WITHIN: "changed within noise", SAME: "the same", UNKNOWN: "cannot be told"}
    parts = [counted(found, verdict, word) for verdict, word in words.items() if found.of(verdict)]
    parts[0] = f"of {rows_text(len(found.rows))} {parts[0]}"
    parts += ["a row of one run failed in the other"] * found.failed
    if len(found.of(SAME)) == len(found.rows) and not found.failed:
        masks = " and all masks" if all(row.masks in (None, 0.0) for row in found.rows) else ""
        return f"B against A: nothing changed: all figures{masks} of {rows_text(len(found.rows))} are the same."
    quiet = "" if found.changed else "nothing changed by more than noise: "
    return f"B against A: {quiet}{'; '.join(parts)}."


def counted(found: Comparison, verdict: str, word: str) -> str:
    """Return how many rows have a verdict, with the names and changes of the first of those that changed."""
    rows = found.of(verdict)
    said = ""
    if verdict in CHANGED:
        names = [f"{row.name} {amount_of(row.decisive)}" for row in rows[:FEW]]
        said = f" ({', '.join([*names, *(['...'] if len(rows) > FEW else [])])})"
    return f"{len(rows)} {word}{said}"


def rows_text(count: int) -> str:
    """Return `1 row` or `3 rows`."""
    return f"{count} row{'s' * (count != 1)}"


def amount_of(change: Change) -> str:
    """Return the mean change with its unit."""
    assert change.difference
    return f"{change.difference.mean:+.4f} {change.unit}".rstrip()


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as text: the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    every = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in (head, *lines))
    return "\n".join("  ".join(cells).rstrip() for cells in every)


def comparison_json(found: Comparison) -> dict[str, Any]:
    """Return the comparison as plain data; a share of mask bits that is not known is null."""
    return {
        "a": str(found.a.directory),
        "b": str(found.b.directory),
        "protocol_differs_in": list(found.protocol),
        "changed": list(found.settings),
        "rows": list(map(row_json, found.rows)),
        "only_in_a": list(found.only_a),
        "only_in_b": list(found.only_b),
        "verdict": verdict_line(found),
    }


def row_json(row: RowChange) -> dict[str, Any]:
    """Return one row as plain data."""
    unknown_share = row.masks is None or math.isnan(row.masks)
    return {
        "label": row.key[0],
        "pattern": row.key[1],
        "seeds": list(row.seeds),
        "verdict": row.verdict,
        "masks_equal": None if row.masks is None else row.masks == 0,
        "mask_bits_that_differ": None if unknown_share else row.masks,
        "cost": {kind: {"a": a, "b": b, "ratio": b / a if a else None} for kind, (a, b) in row.costs.items()},
        "metrics": {change.metric: change_json(change) for change in row.changes},
    }


def change_json(change: Change) -> dict[str, Any]:
    """Return one change as plain data; values are means over seeds."""
    found = change.difference
    interval = None if found is None else {"mean": found.mean, "low": found.low, "high": found.high}
    values = {"a": mean(change.a), "b": mean(change.b)}
    return {**values, "difference": interval, "unit": change.unit, "verdict": change.verdict, "why": change.why}


def mean(values: Sequence[ValueRecord]) -> float:
    """Return the mean of values over seeds."""
    return sum(value["value"] for value in values) / len(values)
