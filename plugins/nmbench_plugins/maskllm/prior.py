"""The gates of the start, derived from the probability that a group leaves its start.

As in the paper, the gate of a pattern grows with the number of kept weights that the pattern shares with the start. A
pattern with d of the N weights exchanged has the gate gap * (N - d), and there are C(N, d) C(M - N, d) of these. A draw
at scale s has the probabilities softmax(s * gates). So with lead = s * gap

    P(leave) = 1 - 1 / sum over d = 0 ... N of  C(N, d) C(M - N, d) exp(-d lead),

which falls from 1 - 1 / C(M, N) at lead 0 to 0. The published start has a lead of 3 where gates have the deviation 0.01
and s is 100: P(leave) = 0.17 at 2:4.
"""

from __future__ import annotations

import functools
import math

import nmbench
from nmbench.pruning import lead_for


def leaving(pattern: nmbench.Pattern, lead: float) -> float:
    """Return the probability that a draw leaves the start."""
    keep, drop = pattern.units.keep, pattern.units.group - pattern.units.keep
    others = sum(math.comb(keep, d) * math.comb(drop, d) * math.exp(-d * lead) for d in range(1, keep + 1))
    return others / (1 + others)


def lead_of(pattern: nmbench.Pattern, leave: float) -> float:
    """Return the lead at which a group leaves its start with probability `leave`; 0 from that of an even draw on."""
    return lead_for(functools.partial(leaving, pattern), leave)
