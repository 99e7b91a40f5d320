"""The pattern of a matrix, told from a sample of its rows."""

from __future__ import annotations

import numpy as np

from nmbench.artifacts.artifact import Matrix
from nmbench.artifacts.group_counts import Array, group_counts, nonzeros
from nmbench.pattern import Pattern

LARGEST_GROUP = 32
SAMPLE_WEIGHTS = 2**16
FIT, EXACT = 0.99, 0.5  # shares of groups: at most N, and N itself


def infer(matrix: Matrix) -> Pattern | None:
    """The sparsest N:M that nearly all groups of the first rows fit, of equally sparse ones that with the smallest M.

    "Nearly", so that a matrix with a few broken groups is told from a dense one; and N must be the usual count, not
    just an upper bound, which any thin matrix has. None if there is no such pattern with M <= 32.
    """
    _, _, rows = next(matrix.slices(1, SAMPLE_WEIGHTS))
    kept = nonzeros(rows).kept
    fits = [group for group in range(2, LARGEST_GROUP + 1) if matrix.shape[1] % group == 0]
    found = [pattern for group in fits if (pattern := fitting(kept[:, : kept.shape[1] // group * group], group))]
    return min(found, key=lambda pattern: (pattern.density, pattern.group), default=None)


def fitting(kept: Array, group: int) -> Pattern | None:
    """The pattern of groups of one size: its N is the least that the share `FIT` of groups does not exceed."""
    if not kept.size:
        return None
    histogram = np.bincount(group_counts(kept, group).reshape(-1), minlength=group + 1)
    share = histogram / histogram.sum()
    keep = int((share.cumsum() >= FIT).argmax())
    return Pattern(keep, group) if 1 <= keep < group and share[keep] >= EXACT else None
