"""RIA: Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models (Zhang et al., ICLR 2024).

Relative importance and activations:

    score_ij = (|W_ij| / sum_k |W_kj|  +  |W_ij| / sum_k |W_ik|) * ||X_j||_2^a,

where the first sum is over the outputs k (a column of W) and the second over the inputs k (a row), X_j is input channel
j over the calibration tokens, and a is `power`. Weights do not change. The permutation of channels that the paper adds
is not part of this method.

The paper's code takes the root of the mean over windows of the sum of squares as the norm, which is
`LayerStats.input_norm`. A common factor of all norms would change no mask, whatever the power. The power changes masks:
0 leaves relative importance alone, 1 weighs inputs as Wanda does. A unit of several weights scores the sum of their
scores: shares of a row and of a column add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import nmbench

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RIA(nmbench.Scorer):
    """Keep the largest |weight| relative to its row and its column, x a power of its input norm; weights stay."""

    needs = nmbench.Stat.INPUT_NORM

    power: float = nmbench.option(0.5, "exponent of the input norms; 0 ignores inputs, 1 weighs them as wanda does")

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 4:
            raise nmbench.NMBenchError(f"ria needs a power from 0 to 4, not {self.power:g}.")

    def score(self, weight: Tensor, stats: nmbench.LayerStats) -> Tensor:
        assert stats.input_norm is not None
        size = weight.float().abs()
        return (shares(size, 0) + shares(size, 1)) * stats.input_norm.pow(self.power)


def shares(size: Tensor, dim: int) -> Tensor:
    """Return `size` `[out, in]`, not negative, divided by its sums along `dim`; 0 where a sum is 0."""
    return (size / size.sum(dim=dim, keepdim=True)).nan_to_num(nan=0.0)


@nmbench.hookimpl
def nmbench_register_baselines(register: nmbench.Register) -> None:
    register("ria", RIA)
