"""Paired comparison: differences of per-window losses on the same windows, with a bootstrap interval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000


@dataclass(frozen=True)
class Difference:
    """Mean difference of losses in nats per token, its 95 % bootstrap interval, and the number of windows."""

    mean: float
    low: float
    high: float
    windows: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out: the two can be told apart. From one window nothing can."""
        return self.windows > 1 and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired(losses: Tensor, reference: Tensor) -> Difference:
    """Compare per-window losses `[windows]`; positive means worse than the reference.

    Windows are resampled together, 2,000 times from a fixed seed, so the interval is the same on every call. Several
    seeds `[seeds, windows]` are averaged first: the interval then speaks of the mean over those seeds.
    """
    difference = (losses.double() - reference.double()).reshape(-1, losses.shape[-1]).mean(dim=0)  # [windows]
    count = len(difference)
    generator = torch.Generator().manual_seed(0)
    means = torch.stack(
        [difference[torch.randint(count, (count,), generator=generator)].mean() for _ in range(RESAMPLES)]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference(float(difference.mean()), low, high, count)
