"""The page: sections in the order in which a reader asks."""

from __future__ import annotations

from importlib.resources import files

import nmbench
from nmbench.results import undone_lines
from nmbench_plugins.publish.page import charts
from nmbench_plugins.publish.page.answer import answers
from nmbench_plugins.publish.page.cost import cost_charts
from nmbench_plugins.publish.page.curves import curves
from nmbench_plugins.publish.page.downloads import downloads
from nmbench_plugins.publish.page.figures import badge
from nmbench_plugins.publish.page.layers import layer_maps
from nmbench_plugins.publish.page.lines import rows_table
from nmbench_plugins.publish.page.markup import el, folded, named, note, section, text
from nmbench_plugins.publish.page.matrix import matrices
from nmbench_plugins.publish.page.overlap import overlaps
from nmbench_plugins.publish.page.repeat import labels, repeats
from nmbench_plugins.publish.page.share import shares
from nmbench_plugins.publish.page.view import Protocol, View, view

FEW = 2  # doubts that are not folded
TITLE = "Strict N:M pruning compared"
COST = (
    "Blue circles are on the Pareto front: no other row of the same protocol and pattern is both better and cheaper. "
    "A cost of zero stands at the left edge. The cost of a row includes that of the row that it begins with."
)


def document(results: nmbench.Results) -> str:
    """Return the HTML document of results."""
    shown = view(results)
    body = "\n".join((header(shown), *sections(shown)))
    scripts = "".join(el("script", code) for code in (charts.javascript(), asset("page.js")) if code)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(TITLE)}</title><style>{asset('page.css')}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main>{scripts}</body></html>\n'
    )


def asset(name: str) -> str:
    """Return a file of this package."""
    return (files("nmbench_plugins.publish.page") / name).read_text(encoding="utf-8")


def header(shown: View) -> str:
    """Return the title, the answers, what is missing, and the doubts."""
    undone = [el("p", text(line), class_="undone") for line in undone_lines(shown.results.directories)]
    parts = (f"<h1>{text(TITLE)}</h1>", answers(shown), *undone, doubts(shown))
    return el("header", "\n".join(parts), id="answer")


def doubts(shown: View) -> str:
    """Return the reasons to distrust a figure, folded if there are many."""
    lines = shown.results.doubts()
    every = "".join(el("p", text(line), class_="doubt") for line in lines)
    if len(lines) <= FEW:
        return every
    return folded(el("span", f"{len(lines)} reasons to distrust figures", class_="doubt"), every)


def sections(shown: View) -> list[str]:
    """Return the sections that have content."""
    quality = cost_charts(shown)
    return [
        section("table", "All rows", rows_table(shown)),
        section("cost", "Quality against cost", note(COST) if quality else without_charts(), quality),
        section("pairs", "Is A better than B?", matrices(shown)),
        section("share", "Share of the baseline's excess removed", shares(shown)),
        section("curves", "Learner curves", curves(shown)),
        section("layers", "Layer by layer", layer_maps(shown)),
        section("overlap", "Overlap of masks", overlaps(shown)),
        section("labels", "What each label stands for", labels(shown)),
        section("protocols", "Protocols", protocols(shown)),
        section("repeat", "How to repeat a row", repeats(shown)),
        section("files", "Files", downloads(shown)),
    ]


def without_charts() -> str:
    """Return the note on how to get charts; nothing where charts can be drawn."""
    return "" if charts.javascript() else note(charts.MISSING)


def protocols(shown: View) -> str:
    """Return what each badge stands for: the protocol line of every run directory."""
    several = len(shown.protocols) > 1
    about = note("Figures under two badges were measured in two ways, and are not compared.") if several else ""
    return about + "\n".join(described(shown, protocol) for protocol in shown.protocols)


def described(shown: View, protocol: Protocol) -> str:
    """Return one badge with the lines of its run directories."""
    lines = [line for line in shown.results.protocol() if protocol.digest in line]
    inside = "".join(el("p", text(line), class_="note") for line in lines)
    head = el("h3", f"{badge(protocol.letter)} {named(protocol.model)}, protocol {text(protocol.digest)}")
    return el("div", head + inside, id=f"protocol-{protocol.letter}", class_="protocol")
