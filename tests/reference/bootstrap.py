"""The exact bootstrap distribution of a mean, over all n^n resamples of n numbers."""

from itertools import product

import numpy as np


def all_means(values: list[float]) -> np.ndarray:
    """The mean of every resample with replacement, float64 [n^n]."""
    return np.array([sum(sample) / len(sample) for sample in product(values, repeat=len(values))])
