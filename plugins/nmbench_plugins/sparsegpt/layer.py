"""One sweep of one layer, and its options: what the solver and the repair of SparseGPT share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import nmbench

if TYPE_CHECKING:
    from torch import Tensor

    from nmbench_plugins.sparsegpt.sweep import BlockSweep


@dataclass(frozen=True)
class SweepOptions:
    """The options of a sweep. `registered`: the name of the method in errors."""

    needs = nmbench.Stat.GRAM
    registered: ClassVar[str]

    damping: float = nmbench.option(0.01, "added to the diagonal of the Hessian, relative to its mean")
    block_columns: int = nmbench.option(128, "columns swept before later ones are updated at once", unit="columns")

    def __post_init__(self) -> None:
        if self.damping < 0 or self.block_columns < 1:
            raise nmbench.NMBenchError(f"{self.registered} needs damping >= 0 and block_columns >= 1.")

    def swept(
        self,
        weight: Tensor,
        stats: nmbench.LayerStats,
        pattern: nmbench.Pattern,
        sweep_block: BlockSweep,
        given: Tensor | None = None,
    ) -> nmbench.Pruned:
        """Return mask and weights of `weight` `[out, in]` after one sweep; `given` is a mask that stays."""
        from nmbench_plugins.sparsegpt.factor import damped_root
        from nmbench_plugins.sparsegpt.sweep import sweep

        assert stats.gram is not None
        dead = stats.gram.diagonal() == 0
        work = weight.float().masked_fill(dead, 0.0)
        root, damping = damped_root(stats.gram, dead, self.damping)
        mask, repaired = sweep(work, root, pattern, self.block_columns, sweep_block, given)
        note = f"damping raised from {self.damping:g} to {damping:g}" if damping != self.damping else ""
        return nmbench.Pruned(mask, repaired.to(weight.dtype) + 0.0, note)
