"""Paired comparison: differences of per-window losses on the same windows, with a bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nmbench.pattern import Pattern

RESAMPLES = 2000
ONE_SIDED_95 = 1.645  # standard errors


@dataclass(frozen=True)
class Difference:
    """Mean difference of losses in nats per token, its 95 % bootstrap interval, and the number of windows."""

    mean: float
    low: float
    high: float
    windows: int

    @property
    def clear(self) -> bool:
        """True if the interval excludes zero: the difference is significant. Never of one window."""
        return self.windows > 1 and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired(losses: Tensor, reference: Tensor) -> Difference:
    """Return the mean paired difference of per-window losses `[windows]`; positive means worse than the reference.

    The bootstrap resamples pairs 2,000 times from a fixed seed, so the interval is the same on every call. Losses of
    several seeds `[seeds, windows]` are averaged first: the interval is then that of the mean over these seeds.
    """
    difference = (losses.double() - reference.double()).reshape(-1, losses.shape[-1]).mean(dim=0)  # [windows]
    return interval(difference.mean(), resampled_means(difference), len(difference))


def interval(mean: Tensor, resamples: Tensor, windows: int) -> Difference:
    """Return a mean with the 95 % interval of its resamples, float64 `[2000]`."""
    low, high = torch.quantile(resamples, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference(float(mean), low, high, windows)


def resampled_means(values: Tensor, drawn_at_once: int = 2**17) -> Tensor:
    """The means of the resamples of values `[n]`, float64 `[2000]`.

    As many resamples are computed together as have at most `drawn_at_once` values; the means are bit for bit the same.
    """
    count, generator = len(values), torch.Generator().manual_seed(0)
    at_once = max(1, drawn_at_once // count)
    sizes = [min(at_once, RESAMPLES - done) for done in range(0, RESAMPLES, at_once)]
    return torch.cat([values[torch.randint(count, (n, count), generator=generator)].mean(dim=1) for n in sizes])


@dataclass(frozen=True)
class Resampled:
    """Mean losses of several rows on the same windows, and their means under the resamples of `paired`.

    Each row is resampled once, so that the differences of all pairs cost a subtraction each. They are those of `paired`
    up to rounding. `means` float64 `[rows]`, `resamples` float64 `[rows, 2000]`.
    """

    means: Tensor
    resamples: Tensor
    windows: int

    def difference(self, row: int, reference: int) -> Difference:
        """Return the paired difference of two rows by their positions; positive: `row` is worse than `reference`."""
        mean, resamples = self.means[row] - self.means[reference], self.resamples[row] - self.resamples[reference]
        return interval(mean, resamples, self.windows)

    def share_removed(self, row: int, baseline: int, reference: int) -> Difference:
        """Return the share of the baseline's excess loss over the reference that `row` does not have.

        1: the loss of the reference; 0: that of the baseline; below zero: worse than the baseline.
        """
        excess = [values[row] - values[reference] for values in (self.means, self.resamples)]
        whole = [values[baseline] - values[reference] for values in (self.means, self.resamples)]
        return interval(1 - excess[0] / whole[0], 1 - excess[1] / whole[1], self.windows)


def resampled(losses: Tensor) -> Resampled:
    """Return the resampled means of the losses `[rows, windows]` of several rows, seeds averaged before."""
    values = losses.double()
    return Resampled(values.mean(dim=1), torch.stack([resampled_means(row) for row in values]), values.shape[1])


@dataclass(frozen=True)
class Confirmation:
    """Test that losses are not worse than others: the mean paired difference in nats and its one-sided 95 % bound."""

    nats: float
    one_sided_95_bound: float
    tolerance_nats: float
    windows: int

    @property
    def holds(self) -> bool:
        """True if the bound is within the tolerance; False if a loss is NaN."""
        return self.one_sided_95_bound <= self.tolerance_nats


def not_worse(losses: Tensor, reference: Tensor, tolerance_nats: float) -> Confirmation:
    """Test that per-window losses `[windows]` are worse than the reference's by at most `tolerance_nats`."""
    difference = losses.double() - reference.double()
    mean = float(difference.mean())
    return Confirmation(mean, mean + ONE_SIDED_95 * standard_error(difference), tolerance_nats, len(difference))


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of values `[n]`, n at least 2."""
    return float(values.std()) / math.sqrt(len(values))


def groups_changed(
    masks: Mapping[str, Tensor], initial: Mapping[str, Tensor], patterns: Mapping[str, Pattern]
) -> float:
    """Return the share of all groups in which `masks` differ from `initial`: layer name -> bool `[out, in]`.

    Both masks of a layer are on one device.
    """
    changed = total = 0
    for name, mask in masks.items():
        differs = patterns[name].groups(mask ^ initial[name]).any(dim=-1)
        changed, total = changed + int(differs.sum()), total + differs.numel()
    return changed / total
