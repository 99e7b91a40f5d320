"""Ranks and marks of the rows of a pattern: which are clearly better, which is best, what cannot be told apart from it.

They come from the paired differences on the same windows and the seeds that all rows have; the dense row has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nmbench.results.format import Record
from nmbench.results.pareto import quality
from nmbench.results.ranking import row_directory
from nmbench.results.records import Rows
from nmbench.results.standing import Standing, standings
from nmbench.spec import DENSE

BEST, TIED = "*", "~"
Key = tuple[str, str, str | None]  # run directory, label, pattern


@dataclass(frozen=True)
class Mark:
    """The place of a row on one text: 1 + the rows that are clearly better. `sign`: `*` best, `~` tied with it."""

    rank: int
    sign: str


@dataclass(frozen=True)
class Marks:
    """The marks of all rows by text, or by the metric whose figures by window were compared.

    `seeds`: the patterns whose rows were compared on some of their seeds only, with these seeds; empty without any.
    """

    by_text: Mapping[tuple[str, Key], Mark]
    seeds: str = ""

    def of(self, record: Record, metric: str, results: Rows) -> Mark | None:
        """Return the mark of a row by a metric; None where rows are not compared by it."""
        key = (str(row_directory(record, results)), record["label"], record["pattern"])
        return self.by_text.get((metric, key)) or self.by_text.get((metric.removeprefix("ppl:"), key))

    def rank(self, record: Record, results: Rows) -> str:
        """Return the rank of a row by the first metric of its run as text; `-` without one."""
        name = quality(results.records)
        mark = self.of(record, name, results) if name else None
        return str(mark.rank) if mark else "-"


def marks(results: Rows) -> Marks:
    """Return the marks of all rows that can be compared, those of a single row excepted."""
    ranked = [standing for standing in standings(results) if standing.ranked]
    some = dict.fromkeys(f"; at {standing.shown}{standing.remark}" for standing in ranked if standing.remark)
    return Marks(dict(pair for standing in ranked for pair in marks_of(standing)), "".join(some))


def marks_of(standing: Standing) -> Iterator[tuple[tuple[str, Key], Mark]]:
    """Yield the marks of the rows on one text."""
    places = [place for place, row in enumerate(standing.rows) if row.record["label"] != DENSE]
    for number, place in enumerate(places if len(places) > 1 else ()):
        row = standing.rows[place]
        key = (str(row.directory), row.record["label"], row.record["pattern"])
        yield (standing.text, key), Mark(rank(standing, places[:number], place), sign(standing, places[0], place))


def rank(standing: Standing, better: Sequence[int], place: int) -> int:
    """Return 1 + the number of rows before `place` that are better by a difference that is clear."""
    return 1 + sum(standing.difference(place, other).clear for other in better)


def sign(standing: Standing, best: int, place: int) -> str:
    """Return `*` for the best row and rows of the very same losses, `~` for rows not told apart from it, else none."""
    found = standing.difference(place, best)
    if found.low == found.high == 0:
        return BEST
    return "" if found.clear else TIED
