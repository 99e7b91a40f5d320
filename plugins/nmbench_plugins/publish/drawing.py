"""The plot of quality against cost, with Pareto fronts and intervals.

Each protocol and pattern has a row of panels, one panel for each kind of cost. The points are those of the HTML page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import zip_longest
from statistics import fmean
from typing import Any

import nmbench
from nmbench.evaluation import Difference
from nmbench_plugins.publish.page.cells import KINDS
from nmbench_plugins.publish.page.cost import BLUE, NAMED, point, points_of
from nmbench_plugins.publish.page.figures import UNITS, large
from nmbench_plugins.publish.page.markup import short
from nmbench_plugins.publish.page.view import Line, Protocol, View, view
from nmbench_plugins.publish.placing import place

GREY = "#8a8a8a"
WIDTH, HEIGHT = 4.6, 3.6  # inches of a panel
MISSING = "the plot needs matplotlib, which is not installed: pip install 'nmbench[plot]'."
FONTS = {"svg.fonttype": "none", "svg.hashsalt": "nmbench", "pdf.fonttype": 42}  # text stays text
DECADE = 10.0
LEFT, RIGHT = 0.08, 0.34  # margins, as shares of the points' width; names stand right of points
LEGEND = (
    "Blue circles: the Pareto front. Grey diamonds: another row is both better and cheaper.\n"
    "Bars: paired 95 % intervals. Costs of zero stand at the left edge."
)
NO_DATE = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}  # equal results are equal files


@dataclass(frozen=True)
class Panel:
    """One panel: a title, what its axes show, and its points as the HTML page has them."""

    title: str
    quality: str
    kind: str
    points: Sequence[dict[str, Any]]

    @property
    def named(self) -> list[tuple[str, float, float]]:
        """The points with a name, highest first, as name, cost and quality: the front alone where there are many."""
        shown = [one for one in self.points if len(self.points) <= NAMED or one["front"]]
        return [(one["row"], one["cost"], one["nats"]) for one in sorted(shown, key=lambda one: -one["nats"])]


def image(results: nmbench.Results, form: str) -> bytes:
    """Return the bytes of a png, svg or pdf file.

    Raises `NMBenchError` if matplotlib is missing or no row can be shown.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise nmbench.NMBenchError(MISSING) from error
    panels = panels_of(view(results))
    if not panels:
        raise nmbench.NMBenchError("there is no row to plot: no method of these runs ended well.")
    file = BytesIO()
    with matplotlib.rc_context(FONTS):
        figure_of(panels).savefig(file, format=form, dpi=150, metadata=NO_DATE[form])
    return file.getvalue()


def panels_of(shown: View) -> list[list[Panel]]:
    """Return the panels that have points: a list for each protocol and pattern, with a panel for each kind of cost."""
    several = len(shown.protocols) > 1
    rows = [
        [
            Panel(f"{protocol.title}, {pattern}" if several else pattern, quality(protocol), kind, points)
            for kind in KINDS
            if (points := points_at(shown, protocol, pattern, kind))
        ]
        for protocol, pattern in shown.groups
    ]
    return [row for row in rows if row]


def points_at(shown: View, protocol: Protocol, pattern: str, kind: str) -> list[dict[str, Any]]:
    """Return the points of one panel by nats over dense, or by the first metric and then without intervals.

    That is where no row has a difference to dense, or the dense model does not predict the text.
    """
    if ranked(protocol) or not protocol.metrics:
        return points_of(shown, protocol, pattern, kind)
    name = protocol.metrics[0]
    known = [line for line in protocol.at(pattern) if kind in line.costs and not line.copied]
    known = [line for line in known if all(name in record["metrics"] for record in line.records)]
    least = min((line.costs[kind] for line in known if line.costs[kind] > 0), default=1.0) / 3
    found = [point(line, mean_of(line, name), kind, least) for line in known]
    return found if protocol.text() is None else [{**one, "front": False} for one in found]


def ranked(protocol: Protocol) -> bool:
    """Return True if rows have a difference to dense on a text that the dense model predicts."""
    text = protocol.text()
    return text is not None and not protocol.unranked(text)


def mean_of(line: Line, metric: str) -> Difference:
    """Return the mean of a metric over seeds, without an interval."""
    return Difference(fmean(record["metrics"][metric]["value"] for record in line.records), math.nan, math.nan, 0)


def quality(protocol: Protocol) -> str:
    """Return what the vertical axis shows."""
    if ranked(protocol):
        return f"nats over dense (lower is better)\n{short(protocol.text() or '')}"
    metric = next(iter(protocol.metrics), "")
    values = (record["metrics"].get(metric) for line in protocol.lines for record in line.records)
    lower = next((value["lower_is_better"] for value in values if value), True)
    better = f"{'lower' if lower else 'higher'} is better"
    return f"{short(metric)}\n({better if protocol.text() is None else 'not ranked: dense does not predict it'})"


def figure_of(rows: Sequence[Sequence[Panel]]) -> Any:
    """Return the figure of rows of panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(map(len, rows))
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * len(rows) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    cells = [(axes, panel) for line, row in zip(grid, rows, strict=True) for axes, panel in zip_longest(line, row)]
    for axes, panel in cells:
        if panel is None:
            axes.set_visible(False)
        else:
            draw(axes, panel)
    figure.supxlabel(LEGEND, fontsize=8, color=GREY)
    figure.draw_without_rendering()  # fixes the layout, in which names find their places
    figure.set_layout_engine("none")
    for axes, panel in cells:
        if panel is not None:
            place(axes, panel.named)
    return figure


def draw(axes: Any, panel: Panel) -> None:
    """Draw one panel: front, intervals, points."""
    front = sorted((one["cost"], one["nats"]) for one in panel.points if one["front"])
    axes.step(*zip(*front, strict=True), where="post", color=BLUE, alpha=0.45, linewidth=1.2) if front else None
    for one in panel.points:
        color = BLUE if one["front"] else GREY
        if "low" in one:
            axes.vlines(one["cost"], one["low"], one["high"], color=color, linewidth=1.4, alpha=0.7)
        marker, size = ("o", 6.0) if one["front"] else ("D", 4.5)
        axes.plot(one["cost"], one["nats"], marker, color=color, markersize=size)
    cost_axis(axes, [one["cost"] for one in panel.points], panel.kind)
    axes.margins(y=0.14)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(UNITS[panel.kind], fontsize=9)
    axes.set_ylabel(panel.quality, fontsize=9)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def cost_axis(axes: Any, costs: Sequence[float], kind: str) -> None:
    """Make the horizontal axis logarithmic, at least a decade wide, with room for names and with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    least, most = min(costs), max(costs)
    wider = max(1.0, math.sqrt(DECADE * least / most))
    least, most = least / wider, most * wider
    span = most / least
    axes.set_xscale("log")
    axes.set_xlim(least / span**LEFT, most * span**RIGHT)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if span > DECADE**2 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: large(x) if kind == "tokens" else f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
