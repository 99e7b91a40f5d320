"""The repair of SparseGPT alone (arXiv 2301.00774, algorithm 1), under the mask of another method.

The sweep goes from left to right as in `solver`, but chooses nothing: the columns to the right compensate for what the
given mask drops. Of SparseGPT's own mask it makes SparseGPT's own weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import nmbench
from nmbench_plugins.sparsegpt.layer import SweepOptions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SparseGPTRepair(SweepOptions, nmbench.LayerRepair):
    """Repair the weights that a given mask keeps as SparseGPT does: later columns compensate for dropped ones."""

    registered = "sparsegpt-repair"

    sequential: bool = nmbench.option(
        False, "true-sequential: gather the inputs of a layer after the layers before it in its block are repaired"
    )

    def repair(
        self, weight: Tensor, stats: nmbench.LayerStats, start: nmbench.Pruned, pattern: nmbench.Pattern
    ) -> nmbench.Pruned:
        """Return the mask of the start with dense weights repaired by one sweep."""
        from nmbench_plugins.sparsegpt import reference

        return self.swept(weight, stats, pattern, reference.repair_block, start.mask)
