"""The search for lam, in units that fit every model.

One update lowers a weight by lam e_N of the others, about lam C(M - 1, N) s^N for weights of size s. So T updates lower
it by its own size if T lam C(M - 1, N) s^(N-1) = 1. The search is for the strength g in

    lam = g / (T C(M - 1, N) s^(N-1)),    s: root mean square of the dense weights,

on the grid of powers of `RATIO`. Trials have fewer updates than the training, at the same strength. The first trials
are at 1 and at its neighbours, later ones beside the best so far, until it is better than both neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

import nmbench
from nmbench_plugins.proxsparse.masters import layers_of

RATIO = 4.0
Patterns = Mapping[str, nmbench.Pattern]


@dataclass(frozen=True)
class Trial:
    """The held-out loss after a trial at strength `RATIO` ** `power`, in nats per token."""

    power: int
    held_out: float


def next_power(trials: Sequence[Trial], most: int) -> int | None:
    """Return the power of the next trial of at most `most`, or None if the search is over."""
    tried = [trial.power for trial in trials]
    best = best_power(trials)
    wanted = [power for power in (best, best + 1, best - 1) if power not in tried]
    return wanted[0] if wanted and len(tried) < most else None


def best_power(trials: Sequence[Trial]) -> int:
    """Return the power of the lowest loss, 0 without trials."""
    return min(trials, key=lambda trial: trial.held_out).power if trials else 0


def lams(
    strength: float, steps: int, weights: Mapping[str, Tensor], patterns: Patterns
) -> dict[nmbench.Pattern, float]:
    """Return lam of every pattern for `steps` updates at a strength; `weights`: the dense ones, by layer."""
    found = {}
    for pattern, names in layers_of(patterns).items():
        squares = sum(float(weights[name].double().square().sum()) for name in names)
        size = math.sqrt(squares / sum(weights[name].numel() for name in names))
        ways = math.comb(pattern.group - 1, pattern.keep)
        found[pattern] = strength / (max(1, steps) * ways * size ** (pattern.keep - 1))
    return found
