"""Repeated times of one thing, and what their ratio is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

UNSTEADY = 0.2  # interquartile range relative to the median


@dataclass(frozen=True)
class Times:
    """Seconds of one product, or of one step, over `n` repetitions after warm-up."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """Median and quartiles of at least two measurements."""
        low, _, high = quantiles(seconds, n=4, method="inclusive")
        return cls(median(seconds), low, high, len(seconds))

    @property
    def unsteady(self) -> bool:
        """True if the interquartile range exceeds `UNSTEADY` of the median, so that the median is doubtful."""
        return self.high - self.low > UNSTEADY * self.median


def verdict(speedup: float | None, *times: Times | None) -> str:
    """A speedup as text: `1.62 x`, `0.45 x, slower`; with a question mark if a measurement was unsteady."""
    if speedup is None:
        return "not possible"
    doubt = "?" if any(time and time.unsteady for time in times) else ""
    return f"{speedup:.2f} x{', slower' if speedup < 1 else ''}{doubt}"
