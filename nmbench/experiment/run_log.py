"""`run.log` of a run directory: the lines of progress, finished rows and doubts of every command, with their times."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nmbench.experiment.progress import DoubtPrinter, Lines, ProgressPrinter, StandardError
from nmbench.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from nmbench.experiment.forecast import Forecast
    from nmbench.plugins.loading import Plugins

NAME = "run.log"


class LogFile:
    """A stream of lines that are appended to `run.log`, each behind its time and the id of the process.

    Lines that are written before the directory is known wait. A log that cannot be written ends with a notice; the run
    goes on without it. Several processes may append to one log, because each line is one write.
    """

    def __init__(self, directory: Path | None = None, notices: Lines | None = None) -> None:
        self.path = directory / NAME if directory else None
        self._notices = notices or StandardError()
        self._waiting: list[str] = []
        self._broken = False

    def open(self, directory: Path) -> None:
        """Append to the log of `directory` from now on."""
        self.path = self.path or directory / NAME
        self.flush()

    def write(self, text: str) -> None:
        """Take lines up; each must be whole."""
        moment = time.strftime("%Y-%m-%d %H:%M:%S")
        self._waiting += [f"{moment} [{os.getpid()}] {line}\n" for line in text.splitlines()]

    def flush(self) -> None:
        """Append the lines that wait, if the directory is known."""
        if self.path is None or self._broken:
            return
        lines, self._waiting = self._waiting, []
        try:
            append(self.path, "".join(lines))
        except OSError as error:
            self._broken = True
            self._notices.write(
                f"NOTICE {self.path} cannot be written: {error.strerror}; the run goes on without it.\n"
            )


class RunLogger:
    """An observer that writes when a run began, with how many rows, and that all of them have records."""

    def __init__(self, log: LogFile) -> None:
        self.log = log

    @hookimpl
    def nmbench_run_started(self, directory: Path, rows: Sequence[Forecast]) -> None:
        self.log.write(f"run started: {len(rows)} rows, {sum(row.done for row in rows)} of them done")
        self.log.open(directory)

    @hookimpl
    def nmbench_run_finished(self) -> None:
        self.log.write("run finished")
        self.log.flush()

    def ended(self, error: BaseException | None) -> None:
        """Write what ended the run before all rows have records; None: nothing did."""
        if error is not None:
            self.log.write(f"run ended: {' '.join(f'{type(error).__name__} {error}'.split())}")
            self.log.flush()


def log_of(plugins: Plugins, directory: Path | None = None) -> RunLogger:
    """Let observers write a log, of `directory` or of that which the run announces; return the one that ends it."""
    log = LogFile(directory)
    logger = RunLogger(log)
    for name, observer in (("log", logger), ("log lines", ProgressPrinter(log)), ("log doubts", DoubtPrinter(log))):
        plugins.add_observer(observer, name)
    return logger


def append(path: Path, text: str) -> None:
    """Append a text by one write, so that lines of several processes do not mix."""
    if text:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)
