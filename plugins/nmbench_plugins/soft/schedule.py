"""The schedules of temperature, noise scale and step size."""

from __future__ import annotations

import math
from dataclasses import dataclass

TEMPERATURE = (1.0, 0.05)  # tau of the first step, and after the annealing
ANNEALING = 0.75  # share of the steps


@dataclass(frozen=True)
class Setting:
    """Temperature tau, noise scale lam, and step size of one step, counted from 0."""

    step: int
    temperature: float
    noise: float
    rate: float


@dataclass(frozen=True)
class Schedule:
    """Exponential annealing of temperature and noise over `ANNEALING` of `steps`, constant after that.

    `noise`: lam of the first step, and after the annealing. The step size falls linearly, from `rate` to `fall` times
    `rate`.
    """

    steps: int
    noise: tuple[float, float]
    rate: float
    fall: float

    def at(self, step: int) -> Setting:
        """Return the setting of a step."""
        share = min(1.0, step / max(1.0, ANNEALING * self.steps))
        left = 1 - step / max(1, self.steps)
        rate = self.rate * (self.fall + (1 - self.fall) * left)
        return Setting(step, between(TEMPERATURE, share), between(self.noise, share), rate)


def between(ends: tuple[float, float], share: float) -> float:
    """Return the value at `share` of the way, along an exponential."""
    first, last = map(math.log, ends)
    return math.exp(first + (last - first) * share)
