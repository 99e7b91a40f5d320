"""Charts: Vega-Lite specifications as plain data, drawn by the library that the page carries.

The library comes from the package vl-convert-python, the extra `nmbench[report]`; without it the page has no charts.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nmbench_plugins.publish.page.markup import el, script_data, text

MISSING = "Charts need the extra: pip install 'nmbench[report]', then make this page again."
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name; nothing is loaded from there


@cache
def javascript() -> str:
    """Return the JavaScript of Vega, Vega-Lite and Vega-Embed; empty without the extra.

    Bundling takes seconds, so the bundle is kept in the user's cache folder, one file per version.
    """
    try:
        converter: Any = import_module("vl_convert")
    except ImportError:
        return ""
    kept = cache_folder() / f"vega-{version('vl-convert-python')}.js"
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    bundle: str = converter.javascript_bundle().replace("</script", "<\\/script")
    keep(kept, bundle)
    return bundle


def cache_folder() -> Path:
    """Return the folder of nmbench in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nmbench"


def keep(path: Path, content: str) -> None:
    """Write a file of the cache in one step; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        return


def chart(title: str, spec: Mapping[str, Any], height: int = 300) -> str:
    """Return the place of a chart with its specification; the width follows the page. Nothing without the library."""
    if not javascript():
        return ""
    whole = {
        "$schema": SCHEMA,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        **spec,
    }
    data = el("script", script_data(whole), type="application/json")
    place = el("div", "", class_="vega", role="img", aria_label=title, style=f"min-height:{height}px")
    return el("figure", el("figcaption", text(title)) + place + data, class_="chart")


def grid(charts: Sequence[str]) -> str:
    """Return charts side by side where the page is wide; nothing without charts."""
    found = list(filter(None, charts))
    return el("div", "".join(found), class_="grid" if len(found) > 1 else "grid one") if found else ""


def panels(name: str, content: Mapping[str, str]) -> str:
    """Return one panel for each title, of which the reader chooses one by a button."""
    found = {title: inside for title, inside in content.items() if inside}
    buttons = "".join(el("button", text(title), type="button", data_panel=title) for title in found)
    shown = "".join(el("div", inside, class_="panel", data_panel=title) for title, inside in found.items())
    switch = el("div", f"{text(name)}: {buttons}", class_="switch", hidden=True) if len(found) > 1 else ""
    return el("div", switch + shown, class_="panels") if found else ""


def intervals(points: Sequence[Mapping[str, Any]], ends: Mapping[str, Any], **mark: Any) -> Iterator[dict[str, Any]]:
    """Yield the layer of the intervals, if a point has one: rules between the fields `low` and `high`."""
    if any("low" in point for point in points):
        known = {"filter": "isValid(datum.low)"}
        yield {"transform": [known], "mark": {"type": "rule", **mark}, "encoding": dict(ends)}


def axis(field: str, title: str, **scale: Any) -> dict[str, Any]:
    """Return the encoding of a number along an axis; `scale` holds the properties of the scale."""
    return {"field": field, "type": "quantitative", "title": title, "scale": scale or {"zero": False}}


def tooltip(**fields: str) -> list[dict[str, Any]]:
    """Return the tooltip of a mark: field -> title; numbers, whose titles begin with `#`, in four digits."""
    number = {"type": "quantitative", "format": ".4~g"}
    return [
        {"field": name, "title": title.removeprefix("#"), **(number if title.startswith("#") else {})}
        for name, title in fields.items()
    ]
