"""A table for a terminal of some width: what is folded, said once, or left out, least important first.

Figures are aligned at their decimal points. Headers are folded before a column goes, and a seed that all rows share is
said below the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

LEAST = ("pareto", "MiB grown", "in N:M", "tokens", "weights", "prune s")  # left out first to last
NAMES = ("run", "label", "pattern", "seed", "seeds", "rank")  # the identity of a row
WORDS = ("run", "label", "pattern", "weights", "pareto")  # columns of text, not of figures
DIFFERENCE = "nats over dense, "
GAP = 2  # columns between two columns
HEADERS = (24, 16, 12, 8, 0)  # characters that headers may keep, tried one after the other
NUMBER = re.compile(r"[+-]?\d+(?![\w:])")  # up to the decimal point
FOLD = re.compile(r"(?<=[a-z]:)|(?<=[/, |])|(?=@)")  # where a header may be folded
Columns = Mapping[str, tuple[str, ...]]  # name -> texts, figures aligned


@dataclass(frozen=True)
class Fitted:
    """A table that fits: headers of one or more lines, the texts of its columns, and a remark on what is not in it.

    All texts of a column have one width.
    """

    heads: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]  # column by column
    remark: str = ""

    @property
    def width(self) -> int:
        """The columns of the terminal that it takes."""
        return sum(width_of(head) for head in self.heads) + GAP * (len(self.heads) - 1)

    @property
    def names(self) -> list[str]:
        """The headers in one line each."""
        return [" ".join(head.split()) for head in self.heads]


def fitted(frame: pandas.DataFrame, width: int | None) -> Fitted:
    """Return the table for `width` columns, or that of names and first metric if it is wider; None: the whole table."""
    columns = {name: texts_of(name, list(frame[name])) for name in frame.columns}
    whole = arranged(columns)
    if width is None or whole.width <= width:
        return whole
    said = []
    found = folded(columns, width)
    if found.width > width and (seed := shared_seed(columns)):
        del columns["seed"]
        said = [f"seed {seed} in all rows"]
        found = folded(columns, width)
    left_out: list[str] = []
    for name in removable(list(columns)):
        if found.width <= width:
            break
        del columns[name]
        left_out.append(name)
        found = folded(columns, width)
    if left_out:
        listed = ", ".join(left_out)
        said.append(f"left out in {width} columns: {listed}; a wider terminal, a pipe or report.csv has all")
    return Fitted(found.heads, found.cells, "; ".join(said))


def shared_seed(columns: Columns) -> str | None:
    """Return the seed of all rows that have one; None if there are several."""
    seeds = {seed for text in columns.get("seed", ()) if (seed := text.strip()) != "-"}
    return seeds.pop() if len(seeds) == 1 else None


def removable(names: Sequence[str]) -> Iterator[str]:
    """Yield the columns that may be left out, in their order."""
    yield from (name for name in LEAST if name in names)
    others = [name for name in names if name not in (*NAMES, *LEAST)]
    differences = [name for name in others if name.startswith(DIFFERENCE)]
    metrics = [name for name in others if name not in differences]
    yield from (*reversed(differences[1:]), *reversed(metrics[1:]), *differences[:1])


def folded(columns: Columns, width: int) -> Fitted:
    """Return all columns of a table, headers folded as little as it takes to fit, or as much as they can be."""
    tables = (arranged(columns, most) for most in HEADERS)
    return next((table for table in tables if table.width <= width), arranged(columns, HEADERS[-1]))


def arranged(columns: Columns, most: int | None = None) -> Fitted:
    """Return all columns of a table.

    `most`: headers wider than their column and than `most` characters are folded; None: none is.
    """
    padded = [column(name, cells, most) for name, cells in columns.items()]
    return Fitted(tuple(head for head, _ in padded), tuple(cells for _, cells in padded))


def column(name: str, cells: Sequence[str], most: int | None) -> tuple[str, tuple[str, ...]]:
    """Return header and texts of a column, padded to one width: words stand on the left, figures on the right."""
    own = max(map(len, cells), default=0)
    head = name if most is None else fold(name, max(most, own))
    width = max(width_of(head), own)
    padded = str.ljust if name in WORDS else str.rjust
    return "\n".join(padded(line, width) for line in head.split("\n")), tuple(padded(cell, width) for cell in cells)


def texts_of(name: str, texts: Sequence[str]) -> tuple[str, ...]:
    """Return the texts of a column, figures aligned."""
    return tuple(texts) if name in WORDS else aligned(texts)


def width_of(head: str) -> int:
    """Return the width of the longest line of a header."""
    return max(map(len, head.split("\n")))


def aligned(cells: Sequence[str]) -> tuple[str, ...]:
    """Return texts of one width whose first numbers have their decimal points below each other."""
    heads = [found[0] if (found := NUMBER.match(cell)) else cell for cell in cells]
    before = max(map(len, heads), default=0)
    padded = [" " * (before - len(head)) + cell for head, cell in zip(heads, cells, strict=True)]
    width = max(map(len, padded), default=0)
    return tuple(f"{cell:<{width}}" for cell in padded)


def fold(head: str, width: int) -> str:
    """Return a header in lines of at most `width` characters, or as narrow as its parts allow."""
    lines = [""]
    for part in filter(None, FOLD.split(head)):
        if lines[-1] and len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
