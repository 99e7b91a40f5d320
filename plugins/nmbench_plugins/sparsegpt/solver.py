"""SparseGPT as a solver: the options, dead inputs, and the order of the steps.

H = (2/windows) * sum X^T X, damped. From left to right, each group keeps the N weights of the highest w^2 / U_cc^2,
where U is the upper Cholesky factor of H^-1; the columns to the right compensate for the dropped weights (arXiv
2301.00774, algorithm 1). Units of several weights are chosen by their joint error (`reference.unit_errors`). `factor`
and `sweep` hold the computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import nmbench
from nmbench_plugins.sparsegpt.layer import SweepOptions

if TYPE_CHECKING:
    from torch import Tensor

    from nmbench_plugins.sparsegpt.sweep import BlockSweep


@dataclass(frozen=True)
class SparseGPT(SweepOptions, nmbench.Solver):
    """Prune column by column and repair the remaining weights with second-order information (arithmetic in float32)."""

    registered = "sparsegpt"

    sequential: bool = nmbench.option(
        False, "true-sequential: gather the inputs of a layer after the layers before it in its block are pruned"
    )

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        return self.swept(weight, stats, pattern, block_sweep(weight, pattern, self.block_columns))


def block_sweep(weight: Tensor, pattern: nmbench.Pattern, block_columns: int) -> BlockSweep:
    """Return the launch of the Triton program where that program is usable, else the plain loop, which is slower."""
    from nmbench_plugins.sparsegpt import launch, reference
    from nmbench_plugins.sparsegpt.sweep import block_width

    width = block_width(pattern, block_columns, weight.shape[1])
    return launch.sweep_block if launch.usable(pattern, width, weight.device) else reference.sweep_block
