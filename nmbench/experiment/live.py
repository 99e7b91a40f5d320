"""The live view of a run on a terminal: overall progress, the job at work, its curve, and memory, a few lines in all.

Finished rows, doubts and whatever else is written to standard error appear above it. The view only shows what observers
are told; it writes to no file and changes no state that a method sees. The cursor is never hidden, so that a killed
process leaves the terminal as it was.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from nmbench.experiment.curve import HELD_OUT, Curve, sparkline
from nmbench.experiment.progress import Pace, count_of, duration, figures_of, finished_line
from nmbench.experiment.timetable import Timetable
from nmbench.plugins.events import Progress
from nmbench.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from nmbench.experiment.forecast import Forecast
    from nmbench.experiment.memory import Estimate

UPDATES = 4  # a second
BAR, CURVE = 24, 32  # columns, where the terminal has them
GIBIBYTE = 2**30


def is_live(stream: TextIO) -> bool:
    """Return True for a terminal that can be rewritten and shows block characters; False in CI."""
    automatic = os.environ.get("CI", "").lower() not in ("", "0", "false")
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    unicode = (stream.encoding or "").lower().replace("-", "") == "utf8"
    return stream.isatty() and unicode and not automatic and not dumb


class LiveView:
    """An observer that keeps the lowest lines of a terminal up to date, from its first event until `close`."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.live import Live

        self.console = console or steady_console(sys.stderr)
        self._lock = threading.Lock()  # the view is drawn by a thread of its own
        self._pace, self._curve, self._timetable = Pace(), Curve(), Timetable()
        self._event: Progress | None = None
        self._stage_left: float | None = None
        self._began = self._job_began = time.monotonic()
        self._live = Live(
            get_renderable=self.view,
            console=self.console,
            transient=True,
            refresh_per_second=UPDATES,
            redirect_stdout=False,  # methods print to standard error, and the table comes after the view
            vertical_overflow="crop",
        )

    @hookimpl
    def nmbench_run_started(self, memory: Estimate, rows: Sequence[Forecast]) -> None:
        with self._lock:
            self._timetable.begin(rows)
        if memory.device != "cpu":
            self._above(str(memory))

    @hookimpl
    def nmbench_progress(self, event: Progress) -> None:
        now = time.monotonic()
        with self._lock:
            if self._event is None or event.job != self._event.job:
                self._job_began = now
            self._pace.begins(event, now)
            self._curve.add(event)
            self._event, self._stage_left = event, self._pace.seconds_left(event, now)
        if not self._live.is_started:
            self._live.start(refresh=True)

    @hookimpl
    def nmbench_method_finished(self, record: Mapping[str, Any]) -> None:
        with self._lock:
            self._timetable.finish(record)
        self._above(finished_line(record), "bold red" if record["status"] != "ok" else "")

    def close(self) -> None:
        """Remove the view; what is above it stays."""
        self._live.stop()

    def _above(self, text: str, style: str = "") -> None:
        from rich.text import Text

        self.console.print(Text(text, style), soft_wrap=True)

    def view(self) -> RenderableType:
        """Return the lines of this moment, each cut to the terminal."""
        from rich.console import Group
        from rich.text import Text

        with self._lock:
            lines = self._lines(self.console.width) if self._event else []
        return Group(*(Text(line, style, no_wrap=True, overflow="ellipsis") for line, style in lines if line))

    def _lines(self, width: int) -> list[tuple[str, str]]:
        """Return the lines and their styles."""
        event, now = self._event, time.monotonic()
        assert event is not None
        elapsed = now - self._job_began
        place, left = self._timetable.place(event.job), self._timetable.left(event.job, elapsed, self._stage_left)
        overall = f"{place}, {left}" if place else ""
        stage_left = "" if self._stage_left is None else f"  {duration(self._stage_left)} left"
        share = min(1.0, event.done / event.total) if event.total else None
        drawn = "" if share is None else f"  {bar(share, min(BAR, width // 4))}"
        job = f"{event.job}: {count_of(event)}{drawn}{stage_left}"
        memory = f"{memory_in_use()}; {duration(elapsed)} of this job, {duration(now - self._began)} in all"
        return [(overall, "bold"), (job, ""), (self._figures(width), "cyan"), (memory, "dim")]

    def _figures(self, width: int) -> str:
        """Return the curve of the job with its lowest point, and its other figures; empty without figures."""
        name, points = self._curve.name, self._curve.points
        if name is None:
            return ""
        curve = f" {sparkline(points, min(CURVE, width // 3))}" if len(points) > 1 else ""
        lowest = f" lowest {min(points):.5g}" if len(points) > 1 and name == HELD_OUT else ""
        return f"{name} {self._curve.latest[name]:.5g}{curve}{lowest}{figures_of(self._curve.others)}"


def steady_console(stream: TextIO) -> Console:
    """Return a console on a terminal that leaves the cursor alone."""
    from rich.console import Console

    class Steady(Console):
        def show_cursor(self, show: bool = True) -> bool:
            """Change nothing, since a killed process could not undo it."""
            return False

    return Steady(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)


def bar(share: float, width: int) -> str:
    """Return a bar of `width` columns, `share` of it full."""
    full = int(share * width)
    return "━" * full + "─" * (width - full)


def memory_in_use() -> str:
    """`memory 1.2 GiB, GPU 3.4 GiB`: resident memory of the process, and memory that torch holds on the GPU."""
    import psutil

    host = f"memory {psutil.Process().memory_info().rss / GIBIBYTE:.1f} GiB"
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return host
    return f"{host}, GPU {torch.cuda.memory_reserved() / GIBIBYTE:.1f} GiB"
