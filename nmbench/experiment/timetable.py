"""The rows of a run while it goes on: which of them is at work, and how long all the others will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from nmbench.experiment.progress import duration, name_of

if TYPE_CHECKING:
    from nmbench.experiment.forecast import Forecast


class Left(NamedTuple):
    """Seconds that are left for all rows, and the rows whose time is not known and not in them."""

    seconds: float
    unknown: int

    def __str__(self) -> str:
        if not self.unknown:
            return f"about {duration(self.seconds)} left"
        more = f"{self.unknown} row{'s' * (self.unknown > 1)} of unknown time"
        return f"more than {duration(self.seconds)} left ({more})" if round(self.seconds) else f"{more} left"


@dataclass
class Timetable:
    """The rows of a run in their order, with what they took or are expected to take.

    A row that no earlier row of the run directory tells of is expected to take as long as the rows of its label that
    this run has finished.
    """

    rows: Sequence[Forecast] = ()
    _finished: set[str] = field(default_factory=set)
    _seconds: dict[str, list[float]] = field(default_factory=dict)

    def begin(self, rows: Sequence[Forecast]) -> None:
        """Take up the rows of a run; some may be done."""
        self.rows = rows
        self._finished |= {row.title for row in rows if row.done}

    def finish(self, record: Mapping[str, Any]) -> None:
        """Note a row that has its record now."""
        self._finished.add(name_of(record))
        if record["status"] == "ok" and record["copied_from"] is None:
            self._seconds.setdefault(record["label"], []).append(record["seconds"]["total"])

    def place(self, job: str) -> str:
        """`job 3 of 16`: rows that are done, and the one at work; empty before the rows are known."""
        if not self.rows:
            return ""
        done = sum(row.title in self._finished for row in self.rows)
        at_work = any(row.title == job and job not in self._finished for row in self.rows)
        return f"job {done + at_work} of {len(self.rows)}"

    def left(self, job: str, seconds: float, stage_left: float | None) -> Left:
        """Return the time that is left while `job` is at work for `seconds`, of whose stage `stage_left` are left."""
        waiting = [row for row in self.rows if row.title not in self._finished]
        others = [self._expected(row) for row in waiting if row.title != job]
        known = [found for found in others if found is not None]
        mine = next((self._expected(row) for row in waiting if row.title == job), 0.0)
        unknown = len(others) - len(known) + (mine is None and stage_left is None)
        rest = max((mine or 0.0) - seconds, stage_left or 0.0)
        return Left(sum(known) + rest, unknown)

    def _expected(self, row: Forecast) -> float | None:
        own = self._seconds.get(row.label)
        return row.seconds if row.seconds is not None else fmean(own) if own else None
