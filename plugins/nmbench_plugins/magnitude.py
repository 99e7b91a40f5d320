"""Magnitude pruning: score = |W|, the baseline for every other criterion (Han et al., arXiv 1506.02626).

A unit of several weights scores the sum of W^2, its part in the squared distance from the dense weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import nmbench

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Magnitude(nmbench.Scorer):
    """Keep the largest absolute weights of every group; needs no data."""

    unit_power: ClassVar[int] = 2

    def score(self, weight: Tensor, stats: nmbench.LayerStats) -> Tensor:
        return weight.float().abs()


@nmbench.hookimpl
def nmbench_register_baselines(register: nmbench.Register) -> None:
    register("magnitude", Magnitude)
