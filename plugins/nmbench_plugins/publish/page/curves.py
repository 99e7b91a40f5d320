"""The figures that learners and block repairs reported while they worked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from nmbench.results import Record
from nmbench_plugins.publish.page import charts
from nmbench_plugins.publish.page.charts import axis, chart, grid, panels, tooltip
from nmbench_plugins.publish.page.markup import note
from nmbench_plugins.publish.page.view import MANY, View

POINTS = 200  # of a line; longer curves are thinned out
FIRST = "held_out"
NOTES = {"held_out": "loss on selection windows, nats"}


def curves(view: View) -> str:
    """Return the charts of every figure, the loss on selection windows first; nothing if no row has a curve."""
    names = dict.fromkeys(name for record in view.results.records for step in record["curve"] for name in step)
    wanted = sorted((name for name in names if name != "step"), key=lambda name: name != FIRST)
    if not wanted:
        return ""
    if not charts.javascript():
        return note("Learners reported figures; records.jsonl has them in the field curve.")
    return panels("Figure", {name: grid(list(charts_of(view, name))) for name in wanted})


def charts_of(view: View, name: str) -> Iterator[str]:
    """Yield a chart for every protocol and pattern with rows that reported the figure."""
    for protocol, pattern in view.groups:
        lines = [
            (f"{line.name} seed {record['seed']}", record) for line in protocol.at(pattern) for record in line.records
        ]
        values = [point for row, record in lines_with(lines, name) for point in points(row, record, name)]
        if values:
            title = f"{NOTES.get(name, name)}: {protocol.title}, {pattern}"
            yield chart(title, specification(values, NOTES.get(name, name)), height=260)


def lines_with(lines: Sequence[tuple[str, Record]], name: str) -> list[tuple[str, Record]]:
    """Return the first rows that reported a figure, at most `MANY`."""
    return [(row, record) for row, record in lines if any(name in step for step in record["curve"])][:MANY]


def points(row: str, record: Record, name: str) -> list[dict[str, Any]]:
    """Return the points of one line, thinned out evenly; the last one stays."""
    found = [step for step in record["curve"] if is_number(step.get(name))]
    every = math.ceil(len(found) / POINTS) if found else 1
    kept = found[:-1:every] + found[-1:]
    return [{"row": row, "step": step["step"], "value": float(f"{step[name]:.6g}")} for step in kept]


def is_number(value: Any) -> bool:
    """True for a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def specification(values: Sequence[dict[str, Any]], title: str) -> dict[str, Any]:
    """Return the chart of lines."""
    legend = {"orient": "bottom", "columns": 2, "labelLimit": 160}
    return {
        "data": {"values": list(values)},
        "mark": {"type": "line", "point": {"size": 18}, "strokeWidth": 1.5},
        "encoding": {
            "x": axis("step", "step, or block of a block repair", nice=False, zero=False),
            "y": axis("value", title),
            "color": {"field": "row", "type": "nominal", "title": None, "legend": legend},
            "tooltip": tooltip(row="row", step="#step", value=f"#{title}"),
        },
    }
