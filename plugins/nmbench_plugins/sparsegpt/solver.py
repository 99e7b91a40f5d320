"""SparseGPT as a solver: the options, dead inputs, and the order of the steps.

H = (2/windows) * sum X^T X, damped. From left to right, each group keeps the N weights of the highest w^2 / U_cc^2,
where U is the upper Cholesky factor of H^-1; the columns to the right compensate for the dropped weights (arXiv
2301.00774, algorithm 1). `factor` and `sweep` hold the computation.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import nmbench
from nmbench_plugins.sparsegpt import launch, reference
from nmbench_plugins.sparsegpt.factor import damped_root
from nmbench_plugins.sparsegpt.sweep import BlockSweep, block_width, sweep


@dataclass(frozen=True)
class SparseGPT(nmbench.Solver):
    """Prune column by column and repair the remaining weights with second-order information (arithmetic in float32)."""

    needs = nmbench.Stat.GRAM

    damping: float = nmbench.option(0.01, "added to the diagonal of the Hessian, relative to its mean")
    block_columns: int = nmbench.option(128, "columns swept before later ones are updated at once", unit="columns")
    sequential: bool = nmbench.option(
        False, "true-sequential: gather the inputs of a layer after the layers before it in its block are pruned"
    )

    def __post_init__(self) -> None:
        if self.damping < 0 or self.block_columns < 1:
            raise nmbench.NMBenchError("sparsegpt needs damping >= 0 and block_columns >= 1.")

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        assert stats.gram is not None
        dead = stats.gram.diagonal() == 0
        work = weight.float().masked_fill(dead, 0.0)
        root, damping = damped_root(stats.gram, dead, self.damping)
        mask, repaired = sweep(work, root, pattern, self.block_columns, block_sweep(work, pattern, self.block_columns))
        note = f"damping raised from {self.damping:g} to {damping:g}" if damping != self.damping else ""
        return nmbench.Pruned(mask, repaired.to(weight.dtype), note)


def block_sweep(weight: Tensor, pattern: nmbench.Pattern, block_columns: int) -> BlockSweep:
    """Return the launch of the Triton program where that program is usable, else the plain loop, which is slower."""
    width = block_width(pattern, block_columns, weight.shape[1])
    return launch.sweep_block if launch.usable(pattern, width, weight.device) else reference.sweep_block
