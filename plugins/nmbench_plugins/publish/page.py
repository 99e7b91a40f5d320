"""`report.html`: tables, rankings, layer errors and the plot in one file that loads no other file."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

import nmbench
from nmbench_plugins.publish.plot import image

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } img { max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.85rem; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; } th:first-child, td:first-child { text-align: left; }
tr.failed td, .doubt { color: #a00; } pre { background: #f4f4f4; padding: 0.8rem; overflow-x: auto; }
"""


class Html(nmbench.Reporter):
    """`report.html`: one self-contained page, with the plot if matplotlib is installed."""

    def write(self, results: nmbench.Results, directory: Path) -> Path:
        path = directory / "report.html"
        path.write_text(page(results), encoding="utf-8")
        return path


def page(results: nmbench.Results) -> str:
    """Return the HTML document."""
    body = [
        "<h1>Strict N:M pruning compared</h1>",
        *(f"<p>{escape(line)}</p>" for line in results.protocol()),
        *(f'<p class="doubt">{escape(line)}</p>' for line in results.doubts()),
        section("Every job", table(results.table())),
        section("Mean ± standard deviation over seeds", table(results.summary())),
        section("Rankings", f"<pre>{escape(rankings(results))}</pre>"),
        section("Quality against cost", plot(results)),
        *(section(f"{metric}, item by item", heat(rows)) for metric, rows in results.details().groupby("metric")),
    ]
    head = f'<meta charset="utf-8"><title>nmbench report</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def section(title: str, content: str) -> str:
    """Return a section, which scrolls sideways if its content is wide."""
    return f'<h2>{escape(title)}</h2>\n<div class="wide">{content}</div>'


def table(frame: Any) -> str:
    """Return the HTML table of a frame of texts; rows that failed are red."""
    head = "".join(f"<th>{escape(name)}</th>" for name in frame.columns)
    lines = []
    for cells in frame.astype(str).to_numpy().tolist():
        kind = ' class="failed"' if "FAILED" in cells else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "\n</table>"


def rankings(results: nmbench.Results) -> str:
    """Return the part of the terminal's report that follows the tables."""
    parts = nmbench.render(results).split("\n\n")
    return "\n\n".join(part for part in parts if "label" not in part.splitlines()[0] and part[:6] != "DOUBT ")


def plot(results: nmbench.Results) -> str:
    """Return the plot as an embedded picture, or the reason why there is no plot."""
    try:
        content = base64.b64encode(image(results, "png")).decode()
    except nmbench.NMBenchError as error:
        return f"<p>{escape(str(error))}</p>"
    return f'<img alt="quality against cost" src="data:image/png;base64,{content}">'


def heat(rows: Any) -> str:
    """Return a table of items by rows of the run, mean over seeds; larger values are redder."""
    rows = rows.assign(row=rows["label"] + " " + rows["pattern"].fillna(""))
    matrix = rows.pivot_table(index="item", columns="row", values="value", sort=False)
    top = max(float(matrix.max(axis=None)), 1e-30)
    head = "<th></th>" + "".join(f"<th>{escape(name.strip())}</th>" for name in matrix.columns)
    lines = [
        f"<tr><td>{escape(item)}</td>" + "".join(cell(float(value), top) for value in values) + "</tr>"
        for item, values in zip(matrix.index, matrix.to_numpy(), strict=True)
    ]
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "\n</table>"


def cell(value: float, top: float) -> str:
    """Return a cell whose red is proportional to value / top."""
    return f'<td style="background: rgba(220, 60, 40, {max(value, 0) / top * 0.8:.3f})">{value:.4f}</td>'
