"""Reporters for files: CSV and JSON with every figure, Markdown with tables, rankings and what labels stand for."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import nmbench

if TYPE_CHECKING:
    import pandas

WORDS = {"run", "label", "pattern", "strict", "weights", "pareto", "method", "begins with", "options", "command"}


class Csv(nmbench.Reporter):
    """`report.csv`: one line per row, nested fields as dotted columns."""

    def write(self, results: nmbench.Results, directory: Path) -> Path:
        path = directory / "report.csv"
        results.frame().to_csv(path, index=False)
        return path


class Json(nmbench.Reporter):
    """`report.json`: the records as one JSON array."""

    def write(self, results: nmbench.Results, directory: Path) -> Path:
        path = directory / "report.json"
        path.write_text(json.dumps(list(results.records), indent=2) + "\n", encoding="utf-8")
        return path


class Markdown(nmbench.Reporter):
    """`report.md`: the protocol, tables of rows and of means over seeds, rankings, and what each label stands for."""

    def write(self, results: nmbench.Results, directory: Path) -> Path:
        path = directory / "report.md"
        path.write_text("\n\n".join(filter(None, sections(results))) + "\n", encoding="utf-8")
        return path


def sections(results: nmbench.Results) -> Iterator[str]:
    """Yield the paragraphs of the Markdown report."""
    from nmbench.results import in_order

    yield from map(code, results.protocol())
    yield pipe_table(dataclasses.replace(results, records=in_order(results.records)).table())
    if len({record["seed"] for record in results.records} - {None}) > 1:
        yield "Mean over seeds (± standard deviation)"
        yield pipe_table(results.summary())
    if rankings := results.rankings():
        yield "\n".join(("```text", *rankings, "```"))
    yield "\n".join(f"- {escaped(line)}" for line in (*results.notes(), *results.doubts()))
    yield from labels(results)


def labels(results: nmbench.Results) -> Iterator[str]:
    """Yield the table of what each label stands for."""
    import pandas

    lines = [
        {
            "label": one.label,
            "method": one.method,
            "begins with": one.started_from or "-",
            "options": one.all_options,
            "command": one.command,
        }
        for one in results.meanings()
    ]
    if lines:
        yield "What each label stands for"
        yield pipe_table(pandas.DataFrame(lines))


def pipe_table(frame: pandas.DataFrame) -> str:
    """Return a frame of texts as a Markdown table, its columns aligned for readers of the source as well."""
    head = list(map(escaped, frame.columns))
    body = [[escaped(str(cell)) for cell in cells] for cells in frame.to_numpy().tolist()]
    widths = [max(3, *map(len, column)) for column in zip(head, *body, strict=True)]
    left = [name in WORDS for name in frame.columns]
    rule = ["-" * width if words else "-" * (width - 1) + ":" for width, words in zip(widths, left, strict=True)]
    return "\n".join(pipes(cells, widths, left) for cells in (head, rule, *body))


def pipes(cells: Sequence[str], widths: Sequence[int], left: Sequence[bool]) -> str:
    """Return one row of a Markdown table."""
    padded = (
        cell.ljust(width) if words else cell.rjust(width)
        for cell, width, words in zip(cells, widths, left, strict=True)
    )
    return f"| {' | '.join(padded)} |"


def escaped(text: str) -> str:
    """Return Markdown source that shows a plain text in a cell."""
    return re.sub(r"([\\|*<`~])", r"\\\1", text)


def code(text: str) -> str:
    """Return a text as code within a line."""
    return f"`{text.replace('`', '')}`"


@nmbench.hookimpl
def nmbench_register_reporters(register: nmbench.Register) -> None:
    register("csv", Csv)
    register("json", Json)
    register("markdown", Markdown)
