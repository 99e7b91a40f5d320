"""The text of a run: the table of its rows, means over seeds, rankings, notes, failures and doubts.

`render` returns it as plain text, for files and pipes; `show` prints it on a terminal, in colours and in its width.
"""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, TextIO

from nmbench.results.doubt_lines import doubt_lines
from nmbench.results.format import Record
from nmbench.results.marks import BEST, Marks, marks
from nmbench.results.notes import FRONTS, MARKED, failures, kept_weights, proof_line, row_notes
from nmbench.results.pareto import loss_of, quality
from nmbench.results.ranking import comparisons, row_groups
from nmbench.results.records import Rows
from nmbench.results.sampled_note import sampled_notes
from nmbench.results.table import AND, asked_rows, in_order, means, rows
from nmbench.results.table_width import GAP, Fitted, fitted
from nmbench.spec import DENSE

if TYPE_CHECKING:
    import pandas
    from rich.console import Console, RenderableType
    from rich.table import Table

FAILED = "FAILED"
STYLES = {"DOUBT": "yellow", FAILED: "red"}  # of lines that begin so
Part = Fitted | str


def render(results: Rows, width: int | None = None) -> str:
    """Return the whole text: one row per job, means over seeds, rankings, notes, failures, doubts.

    Of tables wider than `width` columns the least important columns are left out; None: nothing is.
    """
    found = io.StringIO()
    console = console_on(found, 10_000, terminal=False)
    print_parts(console, parts(results, width), None)
    return "\n".join(line.rstrip() for line in found.getvalue().splitlines())


def show(results: Rows, stream: TextIO, width: int) -> None:
    """Print the same on a terminal of `width` columns: the best in bold, long lines folded between words."""
    print_parts(console_on(stream, width, terminal=True), parts(results, width), width)


def console_on(stream: TextIO, width: int, terminal: bool) -> Console:
    """Return a console that prints texts as they are; without a terminal it writes no control codes."""
    from rich.console import Console

    return Console(
        file=stream,
        width=width,
        force_terminal=terminal,
        color_system="auto" if terminal else None,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )


def parts(results: Rows, width: int | None) -> Iterator[Part]:
    """Yield tables and paragraphs; paragraphs may be empty."""
    shown, found = in_order(asked_rows(results)), marks(results)
    several = len({record["seed"] for record in results.records if record["seed"] is not None}) > 1
    table = fitted(with_marks(rows(shown), shown, None if several else found, results), width)
    yield table
    if more := len(results.records) - len(shown):
        yield f"{more} more rows of other commands: nmbench report {results.directories[0]}"
    if several:
        yield "Mean over seeds (± standard deviation)"
        yield fitted(mean_table(results, found), width)
    fronts = FRONTS if "pareto" in table.names else ""
    yield "\n".join(filter(None, (proof_line(shown), f"{MARKED}{found.seeds}" if found.by_text else "", fronts)))
    yield "\n".join(comparisons(results))
    yield "\n".join(filter(None, (sampled_notes(shown), row_notes(results.records), kept_weights(shown))))
    yield failures(results.records)
    yield "\n".join(doubt_lines(shown))


def mean_table(results: Rows, found: Marks) -> pandas.DataFrame:
    """Return the means over seeds with their marks, best first in each pattern."""
    groups = row_groups(results)
    frame = with_marks(means(results), [group[0] for group in groups], found, results)
    patterns = list(dict.fromkeys(group[0]["pattern"] for group in groups if group[0]["pattern"]))
    name = quality(results.records)

    def place(number: int) -> tuple[int, float]:
        first, values = groups[number][0], [r["metrics"][name] for r in groups[number] if name in r["metrics"]]
        loss = fmean(map(loss_of, values)) if values else math.inf
        return (patterns.index(first["pattern"]) if first["pattern"] else -1, loss)

    return frame.iloc[sorted(range(len(groups)), key=place)]


def with_marks(
    frame: pandas.DataFrame, records: Sequence[Record], found: Marks | None, results: Rows
) -> pandas.DataFrame:
    """Return the table of a terminal: with ranks and marks behind the figures, short names of runs, and no `strict`.

    The rank of a failed row is FAILED. `found`: None leaves ranks and marks out.
    """
    frame = frame.drop(columns="strict", errors="ignore").fillna("-")
    ranks = [rank_of(record, found, results) for record in records]
    if any(rank != "-" for rank in ranks):
        place = next(i for i, name in enumerate(frame.columns) if name in ("seed", "seeds")) + 1
        frame.insert(place, "rank", ranks)
    for name in frame.columns:
        signs = [mark.sign if found and (mark := found.of(r, name, results)) else "" for r in records]
        frame[name] = [cell + sign for cell, sign in zip(frame[name], signs, strict=True)]
    if "run" in frame:
        frame["run"] = short_names(list(frame["run"]))
    return frame


def rank_of(record: Record, found: Marks | None, results: Rows) -> str:
    """Return the rank of a row, FAILED, or `-`."""
    if record["status"] != "ok":
        return FAILED
    return found.rank(record, results) if found else "-"


def short_names(paths: Sequence[str]) -> list[str]:
    """Return paths without the folders that all of them share; a row in several directories has several paths."""
    every = [path.split(AND) for path in paths]
    folders = {Path(path).parent for row in every for path in row}
    shared = os.path.commonpath(folders) if len({path.is_absolute() for path in folders}) == 1 else ""
    return [AND.join(os.path.relpath(path, shared) if shared else path for path in row) for row in every]


def print_parts(console: Console, found: Iterator[Part], width: int | None) -> None:
    """Print tables and paragraphs with a blank line before each; a paragraph that titles a table has none after it."""
    gap = ""
    for part in found:
        if part == "":
            continue
        console.print(gap, end="")
        for piece in painted(part, width):
            console.print(piece)
        gap = "" if isinstance(part, str) and part.startswith("Mean over") else "\n"


def painted(part: Part, width: int | None) -> Iterator[RenderableType]:
    """Yield what a console prints for a table, with its remarks, or for the lines of a paragraph."""
    from rich.text import Text

    if isinstance(part, str):
        for line in part.splitlines():
            yield Text(wrapped(line, width), STYLES.get(line.partition(" ")[0], ""))
        return
    yield table_of(part)
    if part.remark:
        yield Text(wrapped(f"({part.remark})", width), "dim")


def wrapped(line: str, width: int | None) -> str:
    """Return a line folded between words, what follows indented; None: as it is."""
    if width is None or len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def table_of(table: Fitted) -> Table:
    """Return a table of rich: the best figures in bold, dense in grey, failed rows in red."""
    from rich.table import Table
    from rich.text import Text

    found = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold", collapse_padding=True)
    for head in table.heads:
        found.add_column(Text(head), no_wrap=True, vertical="bottom")
    for cells in zip(*table.cells, strict=True):
        row = {name: cell.strip() for name, cell in zip(table.names, cells, strict=True)}
        style = STYLES[FAILED] if row.get("rank") == FAILED else "dim" if row["label"] == DENSE else ""
        found.add_row(*(Text(cell, "bold green" if BEST in cell else "") for cell in cells), style=style)
    return found
