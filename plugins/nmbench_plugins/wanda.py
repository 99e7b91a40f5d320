"""Wanda: A Simple and Effective Pruning Approach for Large Language Models (Sun et al., arXiv 2306.11695).

score_ij = |W_ij| * ||X_j||_2, where X_j is input channel j over the calibration tokens; compared within each group of a
row; weights do not change. A unit of several weights scores the sum of the squares, W_ij^2 ||X_j||^2: what its removal
adds to the squared error of the layer's output if the input channels are uncorrelated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import nmbench

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Wanda(nmbench.Scorer):
    """Keep the weights with the largest |weight| x norm of their input channel; weights do not change."""

    needs = nmbench.Stat.INPUT_NORM
    unit_power: ClassVar[int] = 2

    def score(self, weight: Tensor, stats: nmbench.LayerStats) -> Tensor:
        assert stats.input_norm is not None
        return weight.float().abs() * stats.input_norm


@nmbench.hookimpl
def nmbench_register_baselines(register: nmbench.Register) -> None:
    register("wanda", Wanda)
