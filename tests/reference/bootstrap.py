"""Bootstrap means: exactly, over all n^n resamples of n numbers; and of 2,000 resamples, drawn one by one."""

from itertools import product

import numpy as np
import torch
from torch import Tensor


def all_means(values: list[float]) -> np.ndarray:
    """The mean of every resample with replacement, float64 [n^n]."""
    return np.array([sum(sample) / len(sample) for sample in product(values, repeat=len(values))])


def means_one_by_one(values: Tensor) -> Tensor:
    """The means of 2,000 resamples with replacement, float64 [2000], drawn from seed 0 one after the other."""
    generator, n = torch.Generator().manual_seed(0), len(values)
    return torch.stack([values[torch.randint(n, (n,), generator=generator)].mean() for _ in range(2000)])
