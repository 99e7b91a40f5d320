"""The best N:M mask of a matrix by trying every set of kept columns, group by group."""

from itertools import combinations

import torch
from torch import Tensor


def best_mask(score: Tensor, keep: int, group: int) -> Tensor:
    """Keep the set with the largest sorted scores in each group; among equals the set of the lowest columns."""
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for row, values in enumerate(score.tolist()):
        for first in range(0, len(values), group):
            sets = combinations(range(first, first + group), keep)  # in rising order, and max takes the first of equals
            for column in max(sets, key=lambda kept: sorted((values[c] for c in kept), reverse=True)):
                mask[row, column] = True
    return mask
