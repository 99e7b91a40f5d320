"""Heat maps of figures of layers, such as the output error of every layer: blocks by kinds of layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from nmbench_plugins.publish.page.charts import chart, grid, tooltip
from nmbench_plugins.publish.page.figures import badge
from nmbench_plugins.publish.page.markup import el, folded, named, table, text
from nmbench_plugins.publish.page.view import MANY, Line, Protocol, View

BLOCK = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")  # `model.layers.3.mlp.up_proj`: block 3, kind `mlp.up_proj`


def layer_maps(view: View) -> str:
    """Return the heat maps and, folded, tables of means by kind; nothing if no record has figures of layers."""
    parts = []
    for protocol in view.protocols:
        for metric in protocol.metrics:
            rows = [(line, values) for line in pruned(protocol) if (values := detail(line, metric))][:MANY]
            if rows:
                parts.append(el("h3", f"{named(metric)} of {named(protocol.model)}{badge(protocol.letter)}"))
                parts.append(grid([heat_map(line, values, top(rows)) for line, values in rows]))
                parts.append(folded("Mean by kind of layer", kinds_table(rows)))
    return "\n".join(filter(None, parts))


def pruned(protocol: Protocol) -> list[Line]:
    """Return the rows that are neither dense nor copies."""
    return [line for line in protocol.lines if line.record["pattern"] and not line.copied]


def detail(line: Line, metric: str) -> dict[str, float]:
    """Return the figures of every layer, averaged over seeds."""
    found: dict[str, list[float]] = {}
    for record in line.records:
        for item, value in record["metrics"].get(metric, {}).get("detail", {}).items():
            found.setdefault(item, []).append(float(value))
    return {item: sum(values) / len(values) for item, values in found.items()}


def top(rows: list[tuple[Line, dict[str, float]]]) -> float:
    """Return the largest figure, the end of the shared scale of colours."""
    return max(max(values.values()) for _, values in rows)


def split(item: str) -> tuple[int, str]:
    """Return block and kind of a layer; block 0 and the whole name for other items."""
    found = BLOCK.match(item)
    return (int(found[1]), found[2]) if found else (0, item)


def heat_map(line: Line, values: dict[str, float], largest: float) -> str:
    """Return the heat map of one row."""
    cells = [
        {"layer": item, "block": split(item)[0], "kind": split(item)[1], "value": value}
        for item, value in values.items()
    ]
    title = f"{line.name} {line.pattern}"
    return chart(title, specification(cells, largest), height=24 * len({cell["kind"] for cell in cells}) + 10)


def specification(cells: list[dict[str, Any]], largest: float) -> dict[str, Any]:
    """Return the heat map; all maps of a metric have one scale of colours."""
    legend = {"orient": "bottom", "gradientLength": 160}
    block_axis = {"labelAngle": 0, "labelOverlap": True}
    return {
        "data": {"values": cells},
        "mark": "rect",
        "encoding": {
            "x": {"field": "block", "type": "ordinal", "title": "block", "axis": block_axis},
            "y": {"field": "kind", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 110}},
            "color": {
                **{"field": "value", "type": "quantitative", "title": None, "legend": legend},
                "scale": {"scheme": "viridis", "domain": [0, largest]},
            },
            "tooltip": tooltip(layer="layer", value="#value"),
        },
    }


def kinds_table(rows: list[tuple[Line, dict[str, float]]]) -> str:
    """Return the table of means: kinds of layers by rows."""
    kinds = dict.fromkeys(split(item)[1] for _, values in rows for item in values)
    head = ["kind", *(f"{line.name} {line.pattern}" for line, _ in rows)]
    return table(head, ([text(kind), *means(kind, rows)] for kind in kinds))


def means(kind: str, rows: list[tuple[Line, dict[str, float]]]) -> Iterator[str]:
    """Yield the mean over the layers of a kind, for every row."""
    for _, values in rows:
        found = [value for item, value in values.items() if split(item)[1] == kind]
        yield f"{sum(found) / len(found):.4f}" if found else "-"
