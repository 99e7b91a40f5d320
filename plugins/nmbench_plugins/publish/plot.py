"""`pareto.png`: quality against each kind of cost, with Pareto fronts. Needs matplotlib, the extra `nmbench[plot]`."""

from __future__ import annotations

import itertools
from io import BytesIO
from pathlib import Path
from typing import Any

import nmbench

PANELS = {
    "seconds": ("prune_seconds", "seconds to prune or learn"),
    "tokens": ("computed_tokens", "forward + 2 × backward tokens"),
    "bytes": ("peak_bytes", "peak memory, GiB"),
}
THRESHOLDS = {"seconds": 0.1, "tokens": 100.0}  # below the threshold an axis is linear, so that the axis has a zero
MARKERS = "os^DvPX<>*"
MISSING = "the plot needs matplotlib, which is not installed: pip install 'nmbench[plot]'."


class Plot(nmbench.Reporter):
    """`pareto.png`: the first metric against seconds, tokens and memory, a front for every pattern."""

    def write(self, results: nmbench.Results, directory: Path) -> Path:
        path = directory / "pareto.png"
        path.write_bytes(image(results, "png"))
        return path


def image(results: nmbench.Results, form: str) -> bytes:
    """Return the bytes of a png or svg file. Raises `NMBenchError` if matplotlib is missing or no row can be shown."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise nmbench.NMBenchError(MISSING) from error
    frame = means(results)
    if frame.empty:
        raise nmbench.NMBenchError("there is no row to plot: no method of these runs ended well.")
    colors = {pattern: f"C{index}" for index, pattern in enumerate(frame["pattern"].dropna().unique())}
    markers = dict(zip(frame["label"].unique(), itertools.cycle(MARKERS), strict=False))
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    for axes, (kind, (column, label)) in zip(figure.subplots(1, 3, sharey=True), PANELS.items(), strict=True):
        for pattern, color in colors.items():
            draw(axes, frame[frame["pattern"] == pattern], kind, column, color, markers)
        for value in frame[frame["pattern"].isna()]["value"]:
            axes.axhline(value, color="gray", linestyle="dotted")
        axes.set_xlabel(label)
        axes.margins(x=0.1, y=0.1)
        axes.grid(alpha=0.3)
        if kind != "bytes":  # seconds from zero to days, tokens from none to billions
            axes.set_xscale("symlog", linthresh=THRESHOLDS[kind])
            axes.set_xlim(left=-THRESHOLDS[kind] / 10)
    figure.axes[0].set_ylabel(f"{frame['metric'].iloc[0]}{direction(frame)}")
    figure.legend(handles=legend(colors, markers), loc="outside right upper", fontsize=9)
    file = BytesIO()
    figure.savefig(file, format=form, dpi=130)
    return file.getvalue()


def legend(colors: dict[str, str], markers: dict[str, str]) -> list[Any]:
    """Return legend entries: a colour for every pattern, a marker for every label, the dense line, hollow markers."""
    from matplotlib.lines import Line2D

    methods = {label: marker for label, marker in markers.items() if label != "dense"}
    return [
        Line2D([], [], color="gray", linestyle="dotted", label="dense"),
        *(Line2D([], [], color=color, label=f"{pattern}, front") for pattern, color in colors.items()),
        *(Line2D([], [], color="black", marker=m, linestyle="", label=label) for label, m in methods.items()),
        Line2D([], [], color="black", marker="o", linestyle="", fillstyle="none", label="hollow: not on the front"),
    ]


def means(results: nmbench.Results) -> Any:
    """Return one row per run, label and pattern: mean of the first metric, mean costs, membership of each front."""
    frame = results.tidy()
    first = frame.drop_duplicates(["directory"])[["directory", "metric"]]
    frame = frame.merge(first, on=["directory", "metric"])  # each run counts by its own first metric
    frame["computed_tokens"] = (frame["forward_tokens"] + 2 * frame["backward_tokens"]).astype(float)
    frame["peak_bytes"] = frame["peak_device_bytes"].fillna(frame["peak_host_bytes"]).astype(float) / 2**30
    keys = ["directory", "label", "pattern", "metric", "lower_is_better", *(f"pareto_{kind}" for kind in PANELS)]
    costs = [column for column, _ in PANELS.values()]
    return frame.groupby(keys, dropna=False, sort=False)[["value", *costs]].mean().reset_index()


def draw(axes: Any, rows: Any, kind: str, column: str, color: str, markers: dict[str, str]) -> None:
    """Draw the points of one pattern; points on the front are filled and joined by steps."""
    on = rows[rows[f"pareto_{kind}"].astype(bool)].sort_values(column)
    axes.step(on[column], on["value"], where="post", color=color, alpha=0.5)
    for label, x, y, filled in zip(rows["label"], rows[column], rows["value"], rows[f"pareto_{kind}"], strict=True):
        axes.plot(x, y, markers[label], color=color, fillstyle="full" if filled else "none", markersize=8)


def direction(frame: Any) -> str:
    """Return a text on which direction is better."""
    return " (lower is better)" if frame["lower_is_better"].iloc[0] else " (higher is better)"
