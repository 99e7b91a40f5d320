r"""`report.tex`: quality and cost as booktabs tables, patterns as columns, for `\input` in a paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import nmbench

if TYPE_CHECKING:
    from nmbench_plugins.publish.page.view import Line, Protocol, View

HEAD = (
    "% needs \\usepackage{booktabs}; mean ± standard deviation over seeds\n"
    "% bold: the best of a pattern, and rows that a paired 95 % interval does not tell apart from it\n"
)
SECONDS = "seconds to prune"
Cells = dict[str, dict[str, str]]  # row -> pattern -> cell


class Latex(nmbench.Reporter):
    """`report.tex`: booktabs tables with patterns as columns and the best in bold, a table for each protocol."""

    def write(self, results: nmbench.Results, directory: Path) -> Path:
        path = directory / "report.tex"
        path.write_text(latex(results), encoding="utf-8")
        return path


def latex(results: nmbench.Results) -> str:
    """Return the LaTeX source of the tables; protocols, labels and doubts are comments above them."""
    from nmbench_plugins.publish.page.view import view

    shown = view(results)
    labels = (f"{one}; {one.command}" for one in results.meanings())
    comments = "".join(f"% {line}\n" for line in (*results.protocol(), *labels, *results.doubts()))
    return HEAD + comments + "\n\n".join(tabular(shown, protocol) for protocol in shown.protocols) + "\n"


def tabular(shown: View, protocol: Protocol) -> str:
    """Return the table of one protocol: a row for each label, a group of columns for each metric, one for the cost."""
    patterns = protocol.patterns()
    groups = {metric: quality(shown, protocol, metric) for metric in protocol.metrics} | {SECONDS: seconds(protocol)}
    names = dict.fromkeys(line.name for line in protocol.lines if not line.failed)
    weights = {line.name: line.record["weights_changed"] for line in protocol.lines if not line.failed}
    lines = [r"\begin{tabular}{ll" + "r" * len(patterns) * len(groups) + "}", r"\toprule"]
    lines += [row(["", "", *(rf"\multicolumn{{{len(patterns)}}}{{c}}{{{escaped(name)}}}" for name in groups)])]
    lines += [rules(len(patterns), len(groups)), row(["label", "weights", *map(escaped, patterns * len(groups))])]
    lines += [r"\midrule"]
    for name in names:
        cells = [found.get(name, {}).get(pattern, "-") for found in groups.values() for pattern in patterns]
        lines.append(row([escaped(name), "updated" if weights[name] else "dense", *cells]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def rules(patterns: int, groups: int) -> str:
    """Return the rules below the names of the groups of columns."""
    first = [3 + patterns * place for place in range(groups)]
    return " ".join(rf"\cmidrule(lr){{{start}-{start + patterns - 1}}}" for start in first)


def quality(shown: View, protocol: Protocol, metric: str) -> Cells:
    """Return the cells of one metric; the dense row has its figure at every pattern."""
    from nmbench.results import over_seeds

    cells: Cells = {}
    for pattern in protocol.patterns():
        best = best_of(shown, protocol, pattern, metric)
        for line in (*dense(protocol), *protocol.at(pattern)):
            if values := [record["metrics"][metric] for record in line.records if metric in record["metrics"]]:
                text = escaped(over_seeds(values))
                cells.setdefault(line.name, {})[pattern] = rf"\textbf{{{text}}}" if line.name in best else text
    return cells


def dense(protocol: Protocol) -> list[Line]:
    """Return the dense row."""
    return [line for line in protocol.lines if line.record["pattern"] is None and not line.failed][:1]


def best_of(shown: View, protocol: Protocol, pattern: str, metric: str) -> set[str]:
    """Return the best row of a pattern by a metric, and those that are not told apart from it."""
    losses = {line.name: line.loss(metric) for line in protocol.at(pattern)}
    known = {name: loss for name, loss in losses.items() if loss == loss}
    if len(known) < 2:
        return set()
    least = min(known.values())
    best = {name for name, loss in known.items() if loss == least}
    text = metric.partition(":")[2] if metric.startswith("ppl:") else metric
    standing = shown.standing(protocol, pattern, text)
    places = {row.name: place for place, row in enumerate(standing.rows)} if standing else {}
    if standing is None or not best & places.keys():
        return best
    first = places[min(best & places.keys())]
    same = {name for name, place in places.items() if not standing.difference(place, first).clear}
    return best | (same & known.keys())


def seconds(protocol: Protocol) -> Cells:
    """Return the cells of the cost, mean seconds over seeds."""
    cells: Cells = {}
    for pattern in protocol.patterns():
        for line in protocol.at(pattern):
            if "seconds" in line.costs:
                cells.setdefault(line.name, {})[pattern] = f"{line.costs['seconds']:.1f}"
    return cells


def row(cells: Sequence[str]) -> str:
    """Return one row of the table, from cells of LaTeX source."""
    return " & ".join(cells) + r" \\"


def escaped(text: str) -> str:
    """Return LaTeX source that shows a plain text: every special character is escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    special |= {character: "\\" + character for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)
