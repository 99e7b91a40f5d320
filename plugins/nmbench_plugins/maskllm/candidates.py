"""The patterns of a group that a gate each stands for: all ways to keep N of M weights or units."""

from __future__ import annotations

import functools
import itertools
import math
from typing import TYPE_CHECKING

import nmbench

if TYPE_CHECKING:
    from torch import Tensor

MOST = 256  # patterns of a group: 5:10 has 252, 4:8 has 70


def count_of(pattern: nmbench.Pattern) -> int:
    """Return C(M, N), the number of patterns of a group."""
    return math.comb(pattern.units.group, pattern.units.keep)


def why_too_many(pattern: nmbench.Pattern) -> str | None:
    """Return why the gates of `pattern` are too many, with the remedy, or None if they are not."""
    count = count_of(pattern)
    if count <= MOST:
        return None
    return (
        f"each group has {count:,} patterns with a gate each, {count / pattern.group:,.0f} a weight, and at most "
        f"{MOST} patterns are possible; take soft, which has one logit a weight at any N:M."
    )


@functools.cache
def candidates(pattern: nmbench.Pattern) -> Tensor:
    """Return all patterns of a group, float32 `[C(M, N), group]` of 0 and 1, read-only.

    They are in lexicographic order of the kept places, so that the first of them keeps the lowest places.
    """
    import torch

    units = pattern.units
    kept = torch.tensor(list(itertools.combinations(range(units.group), units.keep)))  # [C(M, N), N]
    return pattern.whole(torch.zeros(len(kept), units.group).scatter_(1, kept, 1.0))
