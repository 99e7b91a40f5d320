"""Ours against theirs: the verdict on every line of a published table, and its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nmbench.cli.published.table import Line, Table
from nmbench.results.format import Record

HEAD = ("label", "metric", "ours", "theirs", "difference", "tolerance", "verdict")
WITHIN, OUTSIDE, FAILED = "within tolerance", "OUTSIDE", "FAILED"


@dataclass(frozen=True)
class Verdict:
    """A line of a table and our figure for it, in the unit of the metric; None if the row failed."""

    line: Line
    ours: float | None

    @property
    def share(self) -> float | None:
        """The difference as a share of the published figure."""
        return None if self.ours is None else self.ours / self.line.value - 1

    @property
    def within(self) -> bool:
        return self.ours is not None and abs(self.ours - self.line.value) <= self.line.tolerance * self.line.value

    @property
    def word(self) -> str:
        return FAILED if self.ours is None else WITHIN if self.within else OUTSIDE


def verdicts(table: Table, records: Sequence[Record]) -> list[Verdict]:
    """Return the verdict on every line, from the records of the run that the table asked for."""
    figures = {
        (record["label"], metric): value["value"]
        for record in records
        if record["status"] == "ok" and record["pattern"] in (None, table.pattern)
        for metric, value in record["metrics"].items()
    }
    return [Verdict(line, figures.get((line.label, line.metric))) for line in table.lines]


def verdict_text(table: Table, found: Sequence[Verdict], model: str) -> str:
    """Return the table of verdicts, the source and tolerance of every line, and the result in the last line.

    A `model` that is not the published one is named in every line.
    """
    other = model != table.model
    rows = [(*HEAD, *(("model",) if other else ()))]
    rows += [(*cells(verdict), *((f"{model}, not {table.model}",) if other else ())) for verdict in found]
    return "\n".join([f"{table.name}: {table.title}", "", *aligned(rows), "", *notes(found), "", result(found)])


def cells(verdict: Verdict) -> tuple[str, ...]:
    """Return the columns of one line as text."""
    line = verdict.line
    theirs, tolerance = f"{line.value:g}", f"{line.tolerance:.1%}"
    if verdict.ours is None or verdict.share is None:
        return (line.label, line.metric, "-", theirs, "-", tolerance, verdict.word)
    difference = f"{verdict.ours - line.value:+.4g} ({verdict.share:+.1%})"
    return (line.label, line.metric, f"{verdict.ours:.4f}", theirs, difference, tolerance, verdict.word)


def aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield rows with columns of equal width, words to the left and figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (
            text.rjust(width) if 2 <= i <= 5 else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(padded).rstrip()


def notes(found: Sequence[Verdict]) -> Iterator[str]:
    """Yield one line for every figure: its source, the reason of the tolerance, and what the published run did else."""
    for verdict in found:
        line = verdict.line
        masks = [f"masks: {line.masks}"] if line.masks else []
        differs = [f"differs: {line.differs}"] if line.differs else []
        parts = [line.source, *masks, f"tolerance {line.tolerance:.1%}: {line.because}", *differs]
        yield f"{line.label} {line.metric}: {'; '.join(parts)}."


def result(found: Sequence[Verdict]) -> str:
    """Return the last line: how many lines are within their tolerance, and which are not."""
    bad = [f"{verdict.line.label} {verdict.line.metric} {verdict.word}" for verdict in found if not verdict.within]
    count = f"{len(found) - len(bad)} of {len(found)} lines {WITHIN}"
    return f"NOT REPRODUCED: {count}; {', '.join(bad)}." if bad else f"REPRODUCED: {count}."
