"""The share of the excess loss of a baseline that each row removes: a figure to compare across models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nmbench.evaluation import Difference
from nmbench_plugins.publish.page.cells import position
from nmbench_plugins.publish.page.charts import axis, chart, intervals, tooltip
from nmbench_plugins.publish.page.figures import badge, interval, minus
from nmbench_plugins.publish.page.markup import el, note, short, table, text
from nmbench_plugins.publish.page.view import MANY, Line, Protocol, View

BASELINES = ("wanda", "magnitude", "sparsegpt")  # methods, the first that a pattern has
NEGLIGIBLE = 1e-3  # nats: of a smaller excess no share is computed


class Group(NamedTuple):
    """The shares of one protocol and pattern: name of a row -> share with its interval."""

    protocol: Protocol
    pattern: str
    baseline: str
    shares: dict[str, Difference]

    @property
    def title(self) -> str:
        """The group in words."""
        return f"{self.protocol.title}, {self.pattern}"


def shares(view: View) -> str:
    """Return the chart and the table; a note if no row can be a baseline."""
    groups = [found for protocol, pattern in view.groups if (found := group(view, protocol, pattern))]
    if not groups:
        return note(f"None of the methods {', '.join(BASELINES)} is a row here, so that there is no baseline.")
    used = ", ".join(dict.fromkeys(f"{one.baseline}" for one in groups))
    about = (
        f"The excess is the loss over dense, in nats. 100 %: as good as dense; 0 %: as good as the baseline, {used}; "
        f"below zero: worse than it. Intervals are paired over windows, where the run directory has losses."
    )
    return (
        note(about)
        + chart("share of the baseline's excess removed", specification(groups), height=40 + 22 * len(rows_of(groups)))
        + shares_table(groups)
    )


def group(view: View, protocol: Protocol, pattern: str) -> Group | None:
    """Return the shares of one pattern on the text that rows are judged by; None without a baseline."""
    lines, judged = protocol.at(pattern), protocol.text()
    methods = {line.record["method"]: line for line in reversed(lines) if not line.copied}
    baseline = next((methods[name] for name in BASELINES if name in methods), None)
    if baseline is None or judged is None or protocol.unranked(judged):
        return None
    found = dict(shares_of(view, protocol, lines, baseline, judged))
    return Group(protocol, pattern, str(baseline.record["method"]), found) if found else None


def shares_of(
    view: View, protocol: Protocol, lines: Sequence[Line], baseline: Line, judged: str
) -> Iterator[tuple[str, Difference]]:
    """Yield every row with its share: from the losses with an interval, else from the records without."""
    standing = view.standing(protocol, str(baseline.record["pattern"]), judged)
    base = baseline.over_dense(judged)
    place = position(standing, baseline) if standing else None
    for line in lines:
        own = position(standing, line) if standing else None
        over = line.over_dense(judged)
        if line is baseline or line.copied or base is None or over is None or abs(base.mean) < NEGLIGIBLE:
            continue
        if standing and place is not None and own is not None and standing.dense is not None:
            yield line.name, standing.resampled.share_removed(own, place, standing.dense)
        else:
            yield line.name, Difference(1 - over.mean / base.mean, float("nan"), float("nan"), over.windows)


def rows_of(groups: Sequence[Group]) -> list[str]:
    """Return the names of the rows of all groups, those with the largest share first, at most `2 * MANY`."""
    best: dict[str, float] = {}
    for one in groups:
        for name, share in one.shares.items():
            best[name] = max(best.get(name, share.mean), share.mean)
    return sorted(best, key=lambda name: -best[name])[: 2 * MANY]


def specification(groups: Sequence[Group]) -> dict[str, Any]:
    """Return the chart: a line for every row, a point with its interval for every model and pattern."""
    names = rows_of(groups)
    values = [
        {"row": name, "group": one.title, "share": share.mean, **interval(share)}
        for one in groups
        for name, share in one.shares.items()
        if name in names
    ]
    y = {"field": "row", "type": "nominal", "sort": names, "title": None, "axis": {"labelLimit": 130, "grid": True}}
    offset = {"yOffset": {"field": "group"}} if len(groups) > 1 else {}
    legend = {"orient": "top", "columns": 1, "labelLimit": 300}
    color = {"field": "group", "type": "nominal", "title": None, "legend": legend}
    ends = {"x": along("low"), "x2": {"field": "high"}}
    return {
        "data": {"values": values},
        "encoding": {"y": y, **offset, "color": color},
        "layer": [
            *intervals(values, ends, strokeWidth=2),
            marks(),
            zero(offset),
        ],
    }


def along(field: str) -> dict[str, Any]:
    """Return the encoding of a share along the axis."""
    return {**axis(field, "share removed", zero=True), "axis": {"format": ".0%", "tickCount": 6, "grid": False}}


def marks() -> dict[str, Any]:
    """Return the layer of the points."""
    about = tooltip(row="row", group="where", share="#share", low="#low", high="#high")
    mark = {"type": "point", "filled": True, "size": 60, "opacity": 1}
    return {"mark": mark, "encoding": {"x": along("share"), "tooltip": about}}


def zero(offset: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layer of the line of the baseline."""
    nothing = {"y": None, "color": None, **dict.fromkeys(offset)}
    mark = {"type": "rule", "strokeDash": [4, 4], "color": "#999999"}
    return {"data": {"values": [{"zero": 0}]}, "mark": mark, "encoding": {"x": along("zero"), **nothing}}


def shares_table(groups: Sequence[Group]) -> str:
    """Return the table: a line for every row, a column for every model and pattern."""
    head = ["row", *(one.title for one in groups)]
    rows = [
        [text(short(name)), *(share_text(one.shares.get(name), one.protocol.letter) for one in groups)]
        for name in rows_of(groups)
    ]
    return table(head, rows)


def share_text(share: Difference | None, letter: str) -> str:
    """Return a share in percent with its interval, if there is one."""
    if share is None:
        return "-"
    spread = "" if share.low != share.low else el("small", minus(f" [{share.low:.1%}, {share.high:.1%}]"))
    return minus(f"{share.mean:.1%}") + spread + badge(letter)
