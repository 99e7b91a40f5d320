"""Progress and doubts as plain lines: on standard error, and in the log of a run.

Without a terminal, a stage shows itself when it has lasted a while, and then at long intervals. On a terminal,
`nmbench/experiment/live.py` takes the place of these lines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from nmbench.plugins.events import Progress
from nmbench.plugins.hookspecs import hookimpl
from nmbench.spec import DENSE

if TYPE_CHECKING:
    from nmbench.experiment.memory import Estimate

LINE_SECONDS = 15.0  # between two lines of a stage
PATIENCE_SECONDS = 5.0  # a stage shows itself when it lasts this long


class Lines(Protocol):
    """A stream of lines, such as a file or standard error."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> object: ...


class StandardError:
    """Standard error as it is when a line is written: a live view puts its own stream there."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


class Pace:
    """The time that is left in a stage, by its pace since its first event."""

    def __init__(self) -> None:
        self._stage: tuple[str, str] | None = None
        self._first = (0, 0.0)  # units done and time at the first event of the stage

    def begins(self, event: Progress, now: float) -> bool:
        """Return True at the first event of a stage; `now` in seconds."""
        if (event.job, event.stage) == self._stage:
            return False
        self._stage, self._first = (event.job, event.stage), (event.done, now)
        return True

    def seconds_left(self, event: Progress, now: float) -> float | None:
        """Return the seconds until the stage ends; None as long as they are not known."""
        done, since = self._first
        if event.done <= done or not event.total:
            return None
        return (now - since) / (event.done - done) * max(0, event.total - event.done)


class ProgressPrinter:
    """An observer that prints lines with stage, count, figures and the time that is left, and finished rows."""

    def __init__(self, stream: Lines | None = None) -> None:
        self.stream = stream or StandardError()
        self._pace, self._printed = Pace(), 0.0

    @hookimpl
    def nmbench_run_started(self, memory: Estimate) -> None:
        if memory.device != "cpu":
            self.show(str(memory))

    @hookimpl
    def nmbench_progress(self, event: Progress) -> None:
        now = time.monotonic()
        if self._pace.begins(event, now):
            self._printed = now - LINE_SECONDS + PATIENCE_SECONDS
        if now - self._printed >= LINE_SECONDS:
            self._printed = now
            self.show(line_of(event, self._pace.seconds_left(event, now)))

    @hookimpl
    def nmbench_method_finished(self, record: Mapping[str, Any]) -> None:
        self.show(finished_line(record))

    def show(self, text: str) -> None:
        """Write one line at once."""
        self.stream.write(f"{text}\n")
        self.stream.flush()


class DoubtPrinter:
    """An observer that prints each doubt once, when it arises: those on the inputs before anything is measured."""

    def __init__(self, stream: Lines | None = None) -> None:
        self.stream = stream or StandardError()
        self._printed: set[str] = set()

    @hookimpl
    def nmbench_run_started(self, doubts: Sequence[str]) -> None:
        self._print(doubts)

    @hookimpl
    def nmbench_method_finished(self, record: Mapping[str, Any]) -> None:
        self._print(record["doubts"], "" if record["label"] == DENSE else f"{name_of(record)}: ")

    def _print(self, doubts: Sequence[str], whose: str = "") -> None:
        for doubt in doubts:
            if doubt not in self._printed:
                self._printed.add(doubt)
                self.stream.write(f"DOUBT {whose}{doubt}\n")
                self.stream.flush()


def finished_line(record: Mapping[str, Any]) -> str:
    """`wanda 2:4 seed 0: ppl:demo@256 146.97 in 9.5 s`, or why the row failed."""
    from nmbench.results.precision import printed  # not above: this module needs no torch

    if record["status"] != "ok":
        return f"{name_of(record)}: failed: {record['error']}"
    figures = ", ".join(f"{metric} {printed(value)}" for metric, value in record["metrics"].items())
    return f"{name_of(record)}: {figures} in {record['seconds']['total']:.1f} s"


def name_of(record: Mapping[str, Any]) -> str:
    """Return the name of a row: `wanda 2:4 seed 0`."""
    where = record["pattern"] or ""
    seed = "" if record["seed"] is None else f" seed {record['seed']}"
    return f"{record['label']} {where}{seed}".strip()


def line_of(event: Progress, seconds_left: float | None) -> str:
    """`maskpro 2:4 seed 0: learn 120/500, loss 3.41, 1 min 05 s left`."""
    left = "" if seconds_left is None else f", {duration(seconds_left)} left"
    return f"{event.job}: {count_of(event)}{figures_of(event.values)}{left}"


def count_of(event: Progress) -> str:
    """`learn 120/500`, or `learn 120` where the end is not known."""
    return f"{event.stage} {event.done}/{event.total}" if event.total else f"{event.stage} {event.done}"


def figures_of(values: Mapping[str, float]) -> str:
    """`, loss 3.41, flips 12`: four digits of each figure."""
    return "".join(f", {name} {value:.4g}" for name, value in values.items())


def duration(seconds: float) -> str:
    """Return seconds in words: `5 s`, `1 min 05 s`, `2 h 03 min`."""
    seconds = round(seconds)  # first, or 59.7 becomes 60 s
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
