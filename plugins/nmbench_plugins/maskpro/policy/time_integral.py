"""Five and more kept weights of a group: the order of exponential clocks as one integral over time.

Give every kept weight an exponential clock of rate y_i = w_i / D, and all dropped weights together one clock of rate 1.
P(S) is the chance that all clocks of S ring before the clock of the dropped. With time t = e^s, a_i = y_i t and
r_i = y_i / (1 + y_i),

    P(S) = integral of e^{-t} prod (1 - e^{-a_i}) dt,     lift = P(S) / prod r_i = integral of f(s) ds
    f(s) = t e^{-t} prod (1 - e^{-a_i}) (1 + 1 / y_i),    g_i = E[a_i / (e^{a_i} - 1)] under f / lift

f is entire and log-concave in s, so the trapezoid rule converges geometrically. Because time is measured in units of 1
/ D, the shape of f is bounded whatever the gaps between logits: the slope of log f is 1 - e^s + sum a_i / (e^{a_i} - 1)
with terms between 0 and 1. So the mode has 1 <= t <= keep + 1; far to the left log f falls by 1 to keep + 1 per unit,
and at distance u right of s0 = log t0 (t0 = 1 + the sum at t = 1, no smaller than the mode) by at least t0 (e^u - 1 -
u). The nodes cover, for every group, the interval where log f is within `drop` of its maximum; this interval is at most
about drop + 6 wide. Inclusion-exclusion would be shorter and cancels catastrophically; all terms here are positive.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Quadrature(NamedTuple):
    """The depth `drop` of the interval in log f, the largest step, the fewest steps (for narrow peaks, many kept)."""

    drop: float
    step: float
    fewest: int


# Absolute errors of 1e-7 and 1e-14 in lift and gradient: a gradient near e^{-drop} has no digits left.
RULES = {torch.float32: Quadrature(22, 0.45, 28), torch.float64: Quadrature(40, 0.2, 64)}


def lift(rate: Tensor) -> Tensor:
    """Return P(S) / prod r_i, [n], between 1 and keep!, from rate [keep, n], float32 or float64."""
    total = torch.zeros_like(rate[0])
    for time, step in _nodes(rate):
        total += _density(time, _odds(rate, time), rate).mul_(step)
    return total


def kept_gradient(rate: Tensor) -> Tensor:
    """Return grad log P for the kept, [keep, n], from rate [keep, n], float32 or float64."""
    total = torch.zeros_like(rate[0])
    gain = torch.zeros_like(rate)
    for time, _ in _nodes(rate):
        odds = _odds(rate, time)
        density = _density(time, odds, rate)  # [n]
        total += density
        gain.addcmul_(odds.mul_(rate), density.mul_(time))
    return gain.div_(total)


def _odds(rate: Tensor, time: Tensor) -> Tensor:
    """Return 1 / (e^a - 1), the odds that a clock has not rung, [keep, n]; 0 where e^a overflows."""
    return (rate * time).expm1_().reciprocal_()


def _density(time: Tensor, odds: Tensor, rate: Tensor) -> Tensor:
    """Return f at one node of every group, [n]; the factors share e^{-t}, because their product alone can overflow."""
    factors = (1 + 1 / rate).mul_(torch.exp(-time / len(rate))).div_(1 + odds)
    return factors.prod(0).mul_(time)


def _nodes(rate: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the times t of the trapezoid rule, [n] each, with the step in s = log t, [n]."""
    rule = RULES[rate.dtype]
    low, high = _interval(rate, rule.drop)
    steps = max(rule.fewest, int(((high - low).max() / rule.step).ceil()))
    step = (high - low) / steps
    for k in range(steps + 1):
        yield (low + k * step).exp_(), step


def _interval(rate: Tensor, drop: float) -> tuple[Tensor, Tensor]:
    """Return bounds in s, [n] each, outside of which log f is at least `drop` below its value near the mode.

    Newton steps begin outside and never pass the solution, so every iterate is a valid bound and few steps suffice.
    """
    start = 1 + (rate / rate.expm1()).sum(0)  # t0 = e^s0, at or above the mode
    peak = start.log() - start + (-(-rate * start).expm1()).log().sum(0)  # log f(s0), without the constant factor
    low = peak - drop
    logs = rate.log()
    for _ in range(5):  # log f <= s + sum min(s + log y, 0) = peak - drop
        above = (low + logs).clamp_(max=0)  # [keep, n]
        low = low - (low + above.sum(0) - (peak - drop)) / (1 + (above < 0).sum(0))
    width = (2 * drop / start).sqrt()
    for _ in range(4):  # t0 (e^u - 1 - u) = drop
        width = width - (width.expm1() - width - drop / start) / width.expm1()
    return low, start.log() + width
