r"""`report.tex`: the summary over seeds as a booktabs table, for `\input` in a paper."""

from __future__ import annotations

from pathlib import Path

import nmbench

HEAD = "% needs \\usepackage{booktabs}; one row per label and pattern, mean ± standard deviation over seeds\n"


class Latex(nmbench.Reporter):
    """`report.tex`: a booktabs table of means over seeds, text left and figures right."""

    def write(self, results: nmbench.Results, directory: Path) -> Path:
        path = directory / "report.tex"
        path.write_text(latex(results), encoding="utf-8")
        return path


def latex(results: nmbench.Results) -> str:
    """Return the LaTeX source of the table, the protocol of every run as comments above it."""
    table = results.summary()
    words = {"run", "label", "pattern", "weights", "pareto"}
    lines = [r"\begin{tabular}{" + "".join("l" if name in words else "r" for name in table.columns) + "}"]
    lines += [r"\toprule", row(list(table.columns)), r"\midrule"]
    lines += [row(cells) for cells in table.astype(str).to_numpy().tolist()]
    lines += [r"\bottomrule", r"\end{tabular}"]
    protocol = "".join(f"% {line}\n" for line in (*results.protocol(), *results.doubts()))
    return HEAD + protocol + "\n".join(lines) + "\n"


def row(cells: list[str]) -> str:
    """Return one row of the table."""
    return " & ".join(escaped(cell) for cell in cells) + r" \\"


def escaped(text: str) -> str:
    """Return LaTeX source that shows a plain text: every special character is escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    special |= {character: "\\" + character for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)
