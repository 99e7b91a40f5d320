"""The schedules of temperature, scale of the gates, reward and step size."""

from __future__ import annotations

import math
from dataclasses import dataclass

ANNEALINGS = ("linear", "exponential")


@dataclass(frozen=True)
class Setting:
    """Temperature tau, scale of the gates, reward and step size of one step, counted from 0."""

    step: int
    temperature: float
    scale: float
    reward: float
    rate: float


@dataclass(frozen=True)
class Schedule:
    """Annealing of temperature and scale over a share `annealed` of `steps`, constant after that.

    `temperature` and `scale`: at the first step, and after the annealing. The step size falls from `rate` to `fall`
    times `rate` along half a period of a cosine, and the reward linearly to 0, both over all steps.
    """

    steps: int
    annealing: str
    annealed: float
    temperature: tuple[float, float]
    scale: tuple[float, float]
    reward: float
    rate: float
    fall: float

    def at(self, step: int) -> Setting:
        """Return the setting of a step."""
        done = step / max(1, self.steps)
        share = min(1.0, done / self.annealed)
        between = linear if self.annealing == "linear" else exponential
        rate = self.rate * (self.fall + (1 - self.fall) * (1 + math.cos(math.pi * done)) / 2)
        return Setting(
            step, between(self.temperature, share), between(self.scale, share), self.reward * (1 - done), rate
        )


def linear(ends: tuple[float, float], share: float) -> float:
    """Return the value at `share` of the way, along a line."""
    return ends[0] + (ends[1] - ends[0]) * share


def exponential(ends: tuple[float, float], share: float) -> float:
    """Return the value at `share` of the way, along an exponential."""
    return ends[0] * (ends[1] / ends[0]) ** share
