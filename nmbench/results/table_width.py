"""A table for a narrow terminal: what matters least is left out, and said to be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

LEAST = ("pareto", "MiB grown", "in N:M", "tokens", "weights", "prune s")  # the first to go first
NAMES = ("run", "label", "pattern", "seed", "seeds", "strict")  # what says which row it is, and whether to believe it
DIFFERENCE = "nats over dense, "


def fitted(frame: pandas.DataFrame, width: int | None) -> str:
    """The table as text in `width` columns, or as near to it as names and first metric allow; None: all of it."""
    text = as_text(frame)
    return text if width is None or not too_wide(text, width) else shortened(frame, width)


def shortened(frame: pandas.DataFrame, width: int) -> str:
    """The widest table that fits, and a line that says what is not in it."""
    left_out = []
    for name in going(frame):
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


def going(frame: pandas.DataFrame) -> Iterator[str]:
    """The columns that may go, in their order; `strict`, which has two parts, stands for its second one."""
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
