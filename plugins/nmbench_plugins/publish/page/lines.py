"""The table of all rows: one body per protocol, sorted and filtered by the script of the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nmbench_plugins.publish.page.cells import KINDS, OVER_DENSE, costs, figures, identity, text_of
from nmbench_plugins.publish.page.figures import badge
from nmbench_plugins.publish.page.markup import el, named, short, text
from nmbench_plugins.publish.page.view import FIRST, Line, Protocol, View

NOTE = (
    "A figure of one seed has its standard error over windows or items, a mean over seeds its standard deviation. "
    "Intervals are paired 95 % bootstrap intervals over windows. Rows sort within their protocol: figures of two "
    "protocols are not comparable. Front: costs at which no row of the same protocol and pattern is both better and "
    "cheaper."
)
ALL = 99  # columns


@dataclass(frozen=True)
class Columns:
    """The columns of the table: metrics, of which one is shown at a time, and kinds of cost."""

    metrics: Sequence[str]
    costs: Sequence[str]


def rows_table(view: View) -> str:
    """Return the controls, the table and its note."""
    metrics = view.metrics
    columns = Columns(metrics, [kind for kind in KINDS if any(kind in line.costs for line in view.lines)])
    bodies = "\n".join(body(view, protocol, columns) for protocol in view.protocols)
    whole = el("table", f"<thead>{head(columns)}</thead>\n{bodies}", id="rows", class_="rows")
    return controls(view, metrics) + whole + el("p", text(NOTE), class_="note")


def controls(view: View, metrics: Sequence[str]) -> str:
    """Return the fields that filter and choose; the script shows them."""
    patterns = dict.fromkeys(line.pattern for line in view.lines if line.record["pattern"])
    several = any(len(line.records) > 1 for line in view.lines)
    fields = [
        el("label", 'Filter <input type="search" id="filter" placeholder="label, model ...">'),
        choice("Pattern", "pattern", {"": "all", **{pattern: pattern for pattern in patterns}}),
        choice("Metric", "metric", {str(index): short(name) for index, name in enumerate(metrics)}) if metrics else "",
        choice("Rows", "each", {"mean": "mean over seeds", "seed": "each seed"}) if several else "",
        el("label", 'Sort by <select id="sort"></select>', class_="narrow"),
    ]
    return el("div", "".join(fields) + '<output id="count"></output>', class_="controls", hidden=True)


def choice(title: str, name: str, options: dict[str, str]) -> str:
    """Return a select field; value -> text shown."""
    inside = "".join(el("option", text(shown), value=value) for value, shown in options.items())
    return el("label", f"{text(title)} " + el("select", inside, id=name))


def head(columns: Columns) -> str:
    """Return the row of column heads, each a button that sorts."""
    cells = [head_cell(name) for name in ("label", "pattern", "seeds")]
    for index, name in enumerate(columns.metrics):
        cells += [head_cell(title, f"n m{index}", hidden=index > 0) for title in titles(name)]
    cells += [head_cell(KINDS[kind], "n") for kind in columns.costs]
    return el("tr", "".join([*cells, head_cell("front"), head_cell("repeat")]))


def titles(metric: str) -> list[str]:
    """Return the heads of the columns of a metric."""
    return [metric, OVER_DENSE] if metric == FIRST or text_of(metric) else [metric]


def head_cell(name: str, class_: str | None = None, hidden: bool = False) -> str:
    """Return the head of a column."""
    return el("th", el("button", named(name), type="button"), scope="col", class_=class_, hidden=hidden)


def body(view: View, protocol: Protocol, columns: Columns) -> str:
    """Return the rows of one protocol under a line that names it."""
    title = f"{badge(protocol.letter)} {named(protocol.model)}, protocol {text(protocol.digest)}"
    about = "".join(remark(protocol, name, index) for index, name in enumerate(columns.metrics))
    group = el("tr", el("th", title + about, colspan=ALL, scope="rowgroup"), class_="group")
    rows = [one for line in protocol.lines for one in of_line(view, protocol, line, columns)]
    return el("tbody", "\n".join([group, *rows]), data_protocol=protocol.letter)


def remark(protocol: Protocol, metric: str, index: int) -> str:
    """Return which metric is the first of a protocol, or that the protocol lacks a metric; else nothing."""
    if metric in protocol.metrics:
        return ""
    word = " first metric:" if metric == FIRST else " without"
    return el("small", f"{word} {named(protocol.named(metric))}", class_=f"m{index}", hidden=index > 0)


def of_line(view: View, protocol: Protocol, line: Line, columns: Columns) -> Iterator[str]:
    """Yield the row over seeds and, of several seeds, the hidden row of each."""
    several = len(line.records) > 1
    yield row(view, protocol, line, columns, "mean" if several else None)
    for record in line.records if several else ():
        yield row(view, protocol, dataclasses.replace(line, records=[record]), columns, "seed")


def row(view: View, protocol: Protocol, line: Line, columns: Columns, each: str | None) -> str:
    """Return one row; `each`: `mean` or `seed` where both are in the table."""
    several = len(protocol.runs) > 1 and line.record["pattern"]
    cells = identity(line, el("small", f" {named(' + '.join(line.runs))}") if several else "")
    if line.failed:
        cells.append(el("td", f"FAILED: {text(line.record.get('error', ''))}", colspan=ALL))
    else:
        cells += [*figures(view, protocol, line, columns.metrics), *costs(columns.costs, line)]
    style = "failed" if line.failed else None if line.record["pattern"] else "dense"
    return el("tr", "".join(cells), class_=style, data_pattern=line.pattern, data_each=each, hidden=each == "seed")
