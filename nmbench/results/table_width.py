"""A table for a narrow terminal: the least important columns are left out, and a line names them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

LEAST = ("pareto", "MiB grown", "in N:M", "tokens", "weights", "prune s")  # left out first to last
NAMES = ("run", "label", "pattern", "seed", "seeds", "strict")  # the identity of a row and its proof
DIFFERENCE = "nats over dense, "


def fitted(frame: pandas.DataFrame, width: int | None) -> str:
    """Return the table as text in `width` columns, or the width of names and first metric; None: the whole table."""
    text = as_text(frame)
    return text if width is None or not too_wide(text, width) else shortened(frame, width)


def shortened(frame: pandas.DataFrame, width: int) -> str:
    """Return the widest table that fits, and a line that names the columns left out."""
    left_out = []
    for name in removable(frame):
        if name == "strict":
            frame, name = frame.assign(strict=frame["strict"].str.partition(",")[0]), "number of groups"
        else:
            frame = frame.drop(columns=name)
        left_out.append(name)
        if not too_wide(as_text(frame), width):
            break
    if not left_out:
        return as_text(frame)
    listed = ", ".join(left_out)
    return f"{as_text(frame)}\n(left out in {width} columns: {listed}; a wider terminal, a pipe or report.csv has all)"


def removable(frame: pandas.DataFrame) -> Iterator[str]:
    """Yield the columns that may be left out, in their order; `strict` stands for its number of groups alone."""
    yield from (name for name in LEAST if name in frame.columns)
    yield from ("strict" for name in frame.columns if name == "strict")
    others = [name for name in frame.columns if name not in (*NAMES, *LEAST)]
    differences = [name for name in others if name.startswith(DIFFERENCE)]
    metrics = [name for name in others if name not in differences]
    yield from (*reversed(differences[1:]), *reversed(metrics[1:]), *differences[:1])


def as_text(frame: pandas.DataFrame) -> str:
    return frame.to_string(index=False)


def too_wide(text: str, width: int) -> bool:
    return max(map(len, text.splitlines()), default=0) > width
