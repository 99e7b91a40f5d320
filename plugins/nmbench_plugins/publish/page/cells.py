"""The cells of a row of the table: figures with their spread, nats over dense, costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from nmbench.evaluation import Difference
from nmbench.results import Standing, ValueRecord, decimals, over_seeds
from nmbench_plugins.publish.page.figures import amount, badge, signed
from nmbench_plugins.publish.page.markup import el, short, text
from nmbench_plugins.publish.page.view import FIRST, Line, Protocol, View

KINDS = {"seconds": "seconds", "tokens": "tokens", "bytes": "GPU memory"}  # kind of cost -> head of its column
OVER_DENSE = "nats over dense"


def cell(head: str, content: str, value: float | None = None, class_: str = "", hidden: bool = False) -> str:
    """Return a cell that names its column on a narrow screen, with the number to sort by; `-` is empty there."""
    number = None if value is None else f"{value:.9g}"
    style = f"{class_} none".strip() if content == "-" else class_ or None
    return el("td", content, data_head=short(head), data_v=number, class_=style, hidden=hidden)


def identity(line: Line, run: str) -> list[str]:
    """Return the cells that name a row; `run` is HTML beside the label."""
    seeds = ", ".join(map(str, line.seeds)) or "-"
    return [
        el("th", text(line.label) + run, scope="row"),
        cell("pattern", text(line.pattern), class_="half"),
        cell("seeds", text(seeds), value=len(line.seeds), class_="half"),
    ]


def figures(view: View, protocol: Protocol, line: Line, metrics: Sequence[str]) -> Iterator[str]:
    """Yield the cells of every metric: its value, and nats over dense on its text."""
    for index, wanted in enumerate(metrics):
        name, style = protocol.named(wanted), f"n m{index}"
        values = [record["metrics"][name] for record in line.records if name in record["metrics"]]
        mean = sum(value["value"] for value in values) / len(values) if values else None
        shown = f"{value_text(values)}{badge(line.letter)}" if values else "-"
        yield cell(name, shown, mean, style, hidden=index > 0)
        if wanted == FIRST or text_of(name):
            over = over_dense(view, protocol, line, text_of(name)) if text_of(name) else None
            shown = f"{signed(over)}{badge(line.letter)}" if over else "-"
            yield cell(OVER_DENSE, shown, over.mean if over else None, style, hidden=index > 0)


def text_of(metric: str) -> str:
    """Return the text of a perplexity, whose losses are compared with the dense model's; empty for other metrics."""
    kind, _, name = metric.partition(":")
    return name if kind == "ppl" else ""


def value_text(values: Sequence[ValueRecord]) -> str:
    """Return a value with its standard error, or the mean over seeds with its standard deviation."""
    if len(values) > 1:
        return text(over_seeds(values))
    error, where = values[0].get("stderr"), values[0].get("where", "")
    digits = decimals(error)
    spread = f" ± {error:.{digits}f}" if error is not None and math.isfinite(error) else ""
    beside = f"{spread} {where}".rstrip()
    return f"{values[0]['value']:.{digits}f}" + (el("small", text(beside)) if beside else "")


def over_dense(view: View, protocol: Protocol, line: Line, name: str) -> Difference | None:
    """Return the difference to dense: of one seed as recorded, of several from the losses."""
    found = line.over_dense(name)
    if found is None or not math.isnan(found.low):
        return found
    standing = view.standing(protocol, str(line.record["pattern"]), name)
    place = position(standing, line) if standing else None
    whole = standing.own_over_dense(place) if standing and place is not None else None
    return whole or found


def position(standing: Standing, line: Line) -> int | None:
    """Return the place of a row in a standing."""
    return next((place for place, row in enumerate(standing.rows) if row.name == line.name), None)


def costs(kinds: Sequence[str], line: Line) -> Iterator[str]:
    """Yield the cells of the costs, of the fronts, and the link to the section on repeating."""
    for kind in kinds:
        known = line.costs.get(kind)
        yield cell(KINDS[kind], "-" if known is None else amount(kind, known).removesuffix(" tokens"), known, "n half")
    yield cell("front", text(", ".join(KINDS[kind] for kind in line.fronts) or "-"), class_="front")
    yield cell("repeat", el("a", "how", href=f"#{line.anchor}"), class_="half")
