"""The pattern of a matrix, inferred from a sample of its rows."""

from __future__ import annotations

import numpy as np

from nmbench.artifacts.artifact import Matrix
from nmbench.artifacts.group_counts import Array, group_counts, nonzeros
from nmbench.pattern import Pattern

LARGEST_GROUP = 32
SAMPLE_WEIGHTS = 2**16
PAIRS = Pattern.parse("2:4x2")
FIT, EXACT = 0.99, 0.5  # least shares of groups that keep at most N, and that keep exactly N


def infer(matrix: Matrix) -> Pattern | None:
    """The sparsest N:M that nearly all groups of the first rows fit; of equally sparse patterns, that of smallest M.

    A few groups may break the pattern, so that a damaged matrix differs from a dense one. N must be the count of most
    groups and not just an upper bound, which any sparse matrix has. None if no pattern with M <= 32 fits. A 4:8 whose
    pairs are whole is 2:4x2; other patterns with units of several weights are not inferred.
    """
    _, _, rows = next(matrix.slices(1, SAMPLE_WEIGHTS))
    kept = nonzeros(rows).kept
    fits = [group for group in range(2, LARGEST_GROUP + 1) if matrix.shape[1] % group == 0]
    found = [pattern for group in fits if (pattern := fitting(kept[:, : kept.shape[1] // group * group], group))]
    best = min(found, key=lambda pattern: (pattern.density, pattern.group), default=None)
    return PAIRS if best == Pattern(PAIRS.keep, PAIRS.group) and in_pairs(kept) else best


def in_pairs(kept: Array) -> bool:
    """Whether a share `FIT` of the pairs are kept or dropped whole, and not just because fours are."""
    pairs, fours = (np.isin(group_counts(kept, size), (0, size)).mean() for size in (2, 4))
    return bool(pairs >= FIT > fours)


def fitting(kept: Array, group: int) -> Pattern | None:
    """The pattern with groups of one size, whose N is the least that a share `FIT` of the groups does not exceed.

    None if fewer than a share `EXACT` of the groups keep exactly N.
    """
    if not kept.size:
        return None
    histogram = np.bincount(group_counts(kept, group).reshape(-1), minlength=group + 1)
    share = histogram / histogram.sum()
    keep = int((share.cumsum() >= FIT).argmax())
    return Pattern(keep, group) if 1 <= keep < group and share[keep] >= EXACT else None
