"""The logits of the start, derived from the probability that a group leaves its start.

A group of the start has logits gap on its N kept weights and 0 elsewhere. A draw at noise scale lam keeps the start if
the N first places of the race all go to kept weights. With r = exp(gap / lam), j kept weights placed already, and
N - j left, the next place goes to a kept weight with probability (N - j) r / ((N - j) r + M - N). So

    P(leave) = 1 - prod over j = 1 ... N of  j r / (j r + M - N),

which falls from 1 - 1 / C(M, N) at gap 0 to 0.
"""

from __future__ import annotations

import functools
import math

import nmbench
from nmbench.pruning import lead_for


def leaving(pattern: nmbench.Pattern, lead: float) -> float:
    """Return the probability that a draw leaves the start, whose kept keys lead by `lead` = gap / lam."""
    units = pattern.units
    dropped = (units.group - units.keep) * math.exp(-lead)
    stays = -sum(math.log1p(dropped / kept) for kept in range(1, units.keep + 1))
    return -math.expm1(stays)


def lead_of(pattern: nmbench.Pattern, leave: float) -> float:
    """Return gap / lam at which a group leaves its start with probability `leave`; 0 from that of an even draw on."""
    return lead_for(functools.partial(leaving, pattern), leave)
