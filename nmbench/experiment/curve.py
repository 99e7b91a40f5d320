"""The figures of the job at work: their latest values, and one of them as a curve in a line of text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from nmbench.plugins.events import Progress

HELD_OUT = "held_out"  # the loss on selection windows, by which learners choose
LEVELS = "▁▂▃▄▅▆▇█"
MOST = 4096  # points that are kept


class Curve:
    """The figures of one job: `latest` by name, and all points of the loss on selection windows.

    A job that reports no such loss has the points of its first figure.
    """

    def __init__(self) -> None:
        self.job = ""
        self.latest: dict[str, float] = {}
        self._points: dict[str, list[float]] = {}

    def add(self, event: Progress) -> None:
        """Take up the figures of an event; another job begins anew."""
        if event.job != self.job:
            self.job, self.latest, self._points = event.job, {}, {}
        self.latest = {**self.latest, **event.values}
        for name, value in event.values.items():
            if math.isfinite(value):
                self._points[name] = thinned([*self._points.get(name, ()), value])

    @property
    def name(self) -> str | None:
        """The name of the figure that is drawn; None without points."""
        return HELD_OUT if HELD_OUT in self._points else next(iter(self._points), None)

    @property
    def points(self) -> Sequence[float]:
        """The points of the figure that is drawn, oldest first."""
        return self._points[self.name] if self.name else ()

    @property
    def others(self) -> Mapping[str, float]:
        """The latest values of all other figures."""
        return {name: value for name, value in self.latest.items() if name != self.name}


def thinned(points: list[float]) -> list[float]:
    """Return every second point of more than `MOST`, else all points."""
    return points[1::2] if len(points) > MOST else points


def sparkline(points: Sequence[float], width: int) -> str:
    """Return points as at most `width` blocks; several points in one block are averaged.

    The lowest block is the least of these means, the full block the largest; equal points are low.
    """
    if not points or width < 1:
        return ""
    count = min(width, len(points))
    cuts = [len(points) * place // count for place in range(count + 1)]
    means = [sum(points[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, span = min(means), max(means) - min(means)
    return "".join(LEVELS[round((mean - low) / span * (len(LEVELS) - 1)) if span else 0] for mean in means)
