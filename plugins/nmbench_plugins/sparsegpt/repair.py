"""The repair of SparseGPT alone (arXiv 2301.00774, algorithm 1), under the mask of another method.

The sweep goes from left to right as in `solver`, but chooses nothing: the columns to the right compensate for what the
given mask drops. Of SparseGPT's own mask it makes SparseGPT's own weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import nmbench
from nmbench_plugins.sparsegpt import reference
from nmbench_plugins.sparsegpt.factor import damped_root
from nmbench_plugins.sparsegpt.sweep import sweep


@dataclass(frozen=True)
class SparseGPTRepair(nmbench.LayerRepair):
    """Repair the weights that a given mask keeps as SparseGPT does: later columns compensate for dropped ones."""

    needs = nmbench.Stat.GRAM

    damping: float = nmbench.option(0.01, "added to the diagonal of the Hessian, relative to its mean")
    block_columns: int = nmbench.option(128, "columns swept before later ones are updated at once", unit="columns")
    sequential: bool = nmbench.option(
        False, "true-sequential: gather the inputs of a layer after the layers before it in its block are repaired"
    )

    def __post_init__(self) -> None:
        if self.damping < 0 or self.block_columns < 1:
            raise nmbench.NMBenchError("sparsegpt-repair needs damping >= 0 and block_columns >= 1.")

    def repair(
        self, weight: Tensor, stats: nmbench.LayerStats, start: nmbench.Pruned, pattern: nmbench.Pattern
    ) -> nmbench.Pruned:
        """Return the mask of the start with dense weights repaired by one sweep."""
        assert stats.gram is not None
        dead = stats.gram.diagonal() == 0
        root, damping = damped_root(stats.gram, dead, self.damping)
        work = weight.float().masked_fill(dead, 0.0)
        _, repaired = sweep(work, root, pattern, self.block_columns, reference.repair_block, start.mask)
        note = f"damping raised from {self.damping:g} to {damping:g}" if damping != self.damping else ""
        return nmbench.Pruned(start.mask, repaired.to(weight.dtype) + 0.0, note)
