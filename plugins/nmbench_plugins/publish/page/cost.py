"""Quality against cost: a panel for every pattern, for seconds, tokens and bytes, with Pareto fronts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nmbench.evaluation import Difference
from nmbench_plugins.publish.page.cells import KINDS, over_dense
from nmbench_plugins.publish.page.charts import axis, chart, grid, intervals, panels, tooltip
from nmbench_plugins.publish.page.figures import UNITS, amount, interval
from nmbench_plugins.publish.page.markup import short
from nmbench_plugins.publish.page.view import Line, Protocol, View

BLUE = "#3b82c4"
ENDS = {"y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}}
FRONT = {"filter": "datum.front"}
SCALES = {"seconds": 1.0, "tokens": 1.0, "bytes": 2.0**30}
FORMATS = {"seconds": "~g", "tokens": "~s", "bytes": "~g"}
NAMED = 14  # rows up to which every point has its name beside it


def cost_charts(view: View) -> str:
    """Return the charts of every kind of cost that some row has."""
    return panels("Cost", {UNITS[kind]: grid(charts_of(view, kind)) for kind in KINDS})


def charts_of(view: View, kind: str) -> list[str]:
    """Return the charts of one kind of cost: for every protocol and pattern."""
    found = []
    for protocol, pattern in view.groups:
        if points := points_of(view, protocol, pattern, kind):
            title = f"{protocol.title}, {pattern}, {short(protocol.text() or '')}"
            found.append(chart(title, specification(points, kind)))
    return found


def points_of(view: View, protocol: Protocol, pattern: str, kind: str) -> list[dict[str, Any]]:
    """Return the rows with their cost and nats over dense; costs of zero stand at the left edge of the log scale."""
    judged = protocol.text()
    known = [line for line in protocol.at(pattern) if kind in line.costs and not line.copied]
    if judged is None or protocol.unranked(judged):
        return []
    least = min((line.costs[kind] for line in known if line.costs[kind] > 0), default=1.0) / 3
    known.sort(key=lambda line: line.costs[kind])
    found = ((line, over_dense(view, protocol, line, judged)) for line in known)
    points = [point(line, over, kind, least) for line, over in found if over is not None]
    return [{**one, "below": bool(place % 2)} for place, one in enumerate(points)]


def point(line: Line, over: Difference, kind: str, least: float) -> dict[str, Any]:
    """Return one row as data of a chart."""
    return {
        "row": line.name,
        "cost": max(line.costs[kind], least) / SCALES[kind],
        "exact": amount(kind, line.costs[kind]),
        "nats": over.mean,
        "front": kind in line.fronts,
        **interval(over),
    }


def specification(points: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Return the chart of one panel: the steps of the front, intervals, points, and names."""
    x = axis("cost", f"{UNITS[kind]} (log scale)", type="log", nice=False, padding=30)
    y = axis("nats", "nats over dense (lower is better)", zero=False, padding=12)
    return {
        "data": {"values": list(points)},
        "encoding": {"x": {**x, "axis": {"format": FORMATS[kind], "grid": False}}, "y": y},
        "layer": [front_steps(), *intervals(points, ENDS, opacity=0.6), marks(kind), *names(len(points))],
    }


def front_steps() -> dict[str, Any]:
    """Return the layer of the steps of the front."""
    line = {"type": "line", "interpolate": "step-after", "opacity": 0.45, "color": BLUE}
    return {"transform": [FRONT], "mark": line}


def marks(kind: str) -> dict[str, Any]:
    """Return the layer of the points: blue circles on the front, grey diamonds off it."""
    about = tooltip(row="row", exact=UNITS[kind], nats="#nats over dense", low="#low", high="#high")
    color = {"condition": {"test": "datum.front", "value": BLUE}, "value": "#999999"}
    shape = {"condition": {"test": "datum.front", "value": "circle"}, "value": "diamond"}
    mark = {"type": "point", "filled": True, "size": 70, "opacity": 1}
    return {"mark": mark, "encoding": {"color": color, "shape": shape, "tooltip": about}}


def names(rows: int) -> Iterator[dict[str, Any]]:
    """Yield the layers of the names, above and below by turns, of the front alone where there are many rows."""
    shown = [] if rows <= NAMED else [FRONT]
    for side, height in (("!datum.below", -8), ("datum.below", 11)):
        mark = {"type": "text", "align": "left", "dx": 6, "dy": height, "limit": 130}
        yield {"transform": [*shown, {"filter": side}], "mark": mark, "encoding": {"text": {"field": "row"}}}
