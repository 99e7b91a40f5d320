"""Progress and doubts on standard error.

Progress is one line that is rewritten on a terminal, a line every 15 seconds in a file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from nmbench.plugins.events import Progress
from nmbench.plugins.hookspecs import hookimpl
from nmbench.spec import DENSE

if TYPE_CHECKING:
    from nmbench.experiment.memory import Estimate

TERMINAL_SECONDS = 0.2  # between two updates
FILE_SECONDS = 15.0
PATIENCE_SECONDS = 5.0  # in a file, a stage shows itself when it lasts this long


class ProgressPrinter:
    """An observer that prints stage, count, figures and the time that is left.

    `lines`: print lines on a terminal, too, because other processes print there.
    """

    def __init__(self, stream: TextIO | None = None, lines: bool = False) -> None:
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty() and not lines
        self._stage: tuple[str, str] | None = None
        self._first = (0, 0.0)  # units done and time at the first event of a stage
        self._printed = 0.0
        self._width = 0

    @hookimpl
    def nmbench_run_started(self, memory: Estimate) -> None:
        if memory.device != "cpu":
            self._show(str(memory), end="\n")

    @hookimpl
    def nmbench_progress(self, event: Progress) -> None:
        now = time.monotonic()
        if (event.job, event.stage) != self._stage:
            self._stage, self._first = (event.job, event.stage), (event.done, now)
            self._printed = 0.0 if self.terminal else now - FILE_SECONDS + PATIENCE_SECONDS
        pause = TERMINAL_SECONDS if self.terminal else FILE_SECONDS
        if now - self._printed >= pause:
            self._printed = now
            self._show(line_of(event, self._remaining(event, now)))

    @hookimpl
    def nmbench_method_finished(self, record: Mapping[str, Any]) -> None:
        name = name_of(record)
        if record["status"] != "ok":
            self._show(f"{name}: failed: {record['error']}", end="\n")
            return
        from nmbench.results.precision import printed  # not above: this module needs no torch

        figures = ", ".join(f"{metric} {printed(value)}" for metric, value in record["metrics"].items())
        self._show(f"{name}: {figures} in {record['seconds']['total']:.1f} s", end="\n")

    def _remaining(self, event: Progress, now: float) -> float | None:
        done, since = self._first
        if event.done <= done or not event.total:
            return None
        return (now - since) / (event.done - done) * max(0, event.total - event.done)

    def _show(self, text: str, end: str = "") -> None:
        if self.terminal:
            self.stream.write(f"\r{text:<{self._width}}{end}")
            self._width = 0 if end else len(text)
        else:
            self.stream.write(f"{text}\n")
        self.stream.flush()


class DoubtPrinter:
    """An observer that prints each doubt once, when it arises: those on the inputs before anything is measured."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
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
                print(f"DOUBT {whose}{doubt}", file=self.stream, flush=True)


def name_of(record: Mapping[str, Any]) -> str:
    """Return the name of a row: `wanda 2:4 seed 0`."""
    where = record["pattern"] or ""
    seed = "" if record["seed"] is None else f" seed {record['seed']}"
    return f"{record['label']} {where}{seed}".strip()


def line_of(event: Progress, seconds_left: float | None) -> str:
    """`maskpro 2:4 seed 0: learn 120/500, loss 3.41, 1 min 05 s left`."""
    count = f"{event.done}/{event.total}" if event.total else str(event.done)
    figures = "".join(f", {name} {value:.4g}" for name, value in event.values.items())
    left = "" if seconds_left is None else f", {duration(seconds_left)} left"
    return f"{event.job}: {event.stage} {count}{figures}{left}"


def duration(seconds: float) -> str:
    """Return seconds in words: `5 s`, `1 min 05 s`, `2 h 03 min`."""
    seconds = round(seconds)  # first, or 59.7 becomes 60 s
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
